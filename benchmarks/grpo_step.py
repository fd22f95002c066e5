#!/usr/bin/env python3
"""GRPO on a small DeepSeek-V3, here and by TRL with transformers: a rollout, and two updates with the same samples.

    OMP_NUM_THREADS=1 python benchmarks/grpo_step.py --trl-python VENV/bin/python [--prompts 8] [--output FILE]

TRL is no dependency: VENV has trl 1.16, accelerate and datasets, beside torch and transformers of the same versions.
Each side runs in a process of its own, from the same weights. TRL generates by transformers, and its samples are those
of both updates on both sides: the gradients' norms of both and the second loss must agree (the first is about 0). Our
rollout answers the same prompts. Processor seconds say more than the clock where other work runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo_step import ASKED, BETA2, PREFIX, write_model, write_pairs

LEARNING_RATE, GROUP, COMPLETION, SEQ_LENGTH, UPDATES = 1e-3, 8, 64, 1024, 2


def reward(completion_ids: list[list[int]], **_) -> list[float]:
    """Return the part of even ids in each answer."""
    return [sum(each % 2 == 0 for each in ids) / len(ids) for ids in completion_ids]


def prompts_of(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [PREFIX + row["prompt"] + ASKED for row in rows]


def trl(folder: Path) -> dict:
    """Return what TRL measures of a rollout and two updates; write its samples into samples.json."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    found = {"rollout_seconds": 0.0, "update_seconds": []}

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            found["update_seconds"].append(time.process_time() - found["begin"])
            found["begin"] = time.process_time()

    class Trainer(GRPOTrainer):
        def _generate(self, prompts):
            begin = time.process_time()
            made = super()._generate(prompts)
            found["rollout_seconds"] = time.process_time() - begin
            return made

        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            samples = [{side: made[f"{side}_ids"][number][made[f"{side}_mask"][number] == 1].tolist()
                        for side in ("prompt", "completion")} for number in range(len(made["prompt_ids"]))]
            (folder / "samples.json").write_text(json.dumps(samples))
            found["begin"] = time.process_time()
            return made

    prompts = prompts_of(folder)
    config = GRPOConfig(
        output_dir=str(folder / "trl"), learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta2=BETA2,
        weight_decay=0.0, max_grad_norm=1e9, per_device_train_batch_size=len(prompts) * GROUP, num_generations=GROUP,
        num_iterations=UPDATES, max_steps=UPDATES, max_completion_length=COMPLETION, loss_type="grpo", beta=0.0,
        temperature=1.0, logging_steps=1, report_to="none", save_strategy="no", gradient_checkpointing=False,
        bf16=False, use_cpu=True, disable_tqdm=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    data, tokenizer = Dataset.from_list([{"prompt": each} for each in prompts]), AutoTokenizer.from_pretrained(
        folder / "model")
    trainer = Trainer(model, reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    return found | {name: [record[key] for record in records] for name, key in (("losses", "loss"),
                                                                                ("norms", "grad_norm"))}


def ours(folder: Path) -> dict:
    """Return the same of our rollout of TRL's prompts, and of updates with TRL's samples."""
    import torch

    from megatron_deepseek.checkpoint.job import distributed as checkpoint
    from megatron_deepseek.data.tokenizer import build_tokenizer
    from megatron_deepseek.model.architecture.config import ModelConfig
    from megatron_deepseek.model.build import BuildOptions, Precision
    from megatron_deepseek.parallel.layout import Layout
    from megatron_deepseek.parallel.layout_string import Stage
    from megatron_deepseek.parallel.mesh import build_meshes
    from megatron_deepseek.parallel.start import join_job
    from megatron_deepseek.rl.advantages import group_advantages
    from megatron_deepseek.rl.objective import GroupRelative
    from megatron_deepseek.rl.rollout.engine import RolloutEngine
    from megatron_deepseek.rl.rows import RowShape, pack_samples
    from megatron_deepseek.rl.samples import OLD, Sample
    from megatron_deepseek.rl_settings import PolicyLossSettings, RolloutSettings
    from megatron_deepseek.settings import LossSettings, OptimizerSettings
    from megatron_deepseek.training.trainer import Trainer, TrainingSpec

    device, settings = torch.device("cpu"), PolicyLossSettings()
    join_job(device, 10.0)
    model = ModelConfig.from_file(folder / "model")
    whole = Stage(True, tuple(range(model.num_hidden_layers)), (), True)
    spec = TrainingSpec(model, (whole,), "1F1B", SEQ_LENGTH, 1,
                        BuildOptions(precision=Precision(), loss=LossSettings(balance_type="none")),
                        OptimizerSettings(adam_beta2=BETA2, weight_decay=0.0, clip_grad=0.0))
    trainer = Trainer(spec, build_meshes(Layout(), device), GroupRelative(settings))
    checkpoint.load_weights(folder / "model", trainer.stages)

    given = json.loads((folder / "samples.json").read_text())
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder / "model"))
    engine = RolloutEngine(trainer, RolloutSettings(), tokenizer, ends=(tokenizer.eod,), max_length=SEQ_LENGTH)
    begin = time.process_time()
    engine.refresh()
    groups = engine.generate([tuple(each["prompt"]) for each in given[::GROUP]], range(len(given) // GROUP),
                             RolloutSettings(group_size=GROUP, max_tokens=COMPLETION), 1.0)
    found = {"rollout_seconds": time.process_time() - begin, "losses": [], "norms": [], "update_seconds": [],
             "rollout_tokens": sum(len(sample.tokens) for group in groups for sample in group)}
    engine.release()

    samples = [Sample(number // GROUP, tuple(each["prompt"]), tuple(each["completion"]), "", "stop",
                      (0.0,) * len(each["completion"])) for number, each in enumerate(given)]
    rewards = reward([each["completion"] for each in given])
    advantages = group_advantages(rewards, [sample.group for sample in samples], settings).values_N
    packed = pack_samples(samples, advantages, RowShape(SEQ_LENGTH, 1, 0))
    old = packed.of_samples(trainer.score(packed.batch).log_probabilities_BS)
    batch = pack_samples(samples, advantages, RowShape(SEQ_LENGTH, 1, 0),
                         {OLD: [old[number] for number in range(len(samples))]}).batch
    for _ in range(UPDATES):
        begin = time.process_time()
        result = trainer.train_step(batch, LEARNING_RATE)
        found["update_seconds"].append(time.process_time() - begin)
        found["losses"].append(result.losses.reports["grpo_loss"])
        found["norms"].append(result.grad_norm)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", type=Path, default=Path(sys.executable), help="the Python that has TRL")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        found = {"ours": ours, "trl": trl}[args.side](args.folder)
        (args.folder / f"{args.side}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), {}
        write_pairs(folder / "pairs.jsonl", args.prompts)
        write_model(folder)
        for side, python in (("trl", args.trl_python), ("ours", sys.executable)):
            subprocess.run([str(python), __file__, "--side", side, "--folder", name], check=True)
            found[side] = json.loads((folder / f"{side}.json").read_text())
        drawn = json.loads((folder / "samples.json").read_text())
    found["trl"]["rollout_tokens"] = sum(len(each["completion"]) for each in drawn)
    for side, record in found.items():
        record["tokens_per_second"] = record["rollout_tokens"] / record["rollout_seconds"]
        print(f"{side:5} losses {record['losses']}, norms {record['norms']}; {record['update_seconds'][-1]:.2f} s "
              f"an update, {record['tokens_per_second']:.0f} tokens a second in the rollout, of a processor's time")
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
