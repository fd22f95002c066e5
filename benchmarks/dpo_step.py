#!/usr/bin/env python3
"""A step of DPO on a small DeepSeek-V3, here and by TRL with transformers, from the same weights and pairs.

    OMP_NUM_THREADS=1 python benchmarks/dpo_step.py --trl-python VENV/bin/python [--steps 6] [--output FILE]

TRL is no dependency: VENV has trl 1.16, accelerate and datasets, beside torch and transformers of the same versions.
Each side runs in a process of its own. Both have the reference's log-probabilities beforehand, take all pairs in every
step, and AdamW of the same settings; the losses must agree. TRL pads pairs to the longest of a micro-batch, here they
are packed. Processor seconds of a step, the first left out, say more than the clock where other work runs.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BETA, LEARNING_RATE, CLIP, BETA2, SEQ_LENGTH = 0.1, 1e-3, 1.0, 0.95, 2048
MODEL = {"model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 96,
         "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
         "moe_intermediate_size": 128, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
         "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
         "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0, "max_position_embeddings": 2048,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
PREFIX, ASKED = "<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>"


def write_pairs(path: Path, number: int) -> None:
    """Write pairs of questions of 16 to 160 bytes, and answers of 8 to 320."""
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return "".join(draw.choices("abcdefghij ", k=draw.randint(least, most))).strip() + "."

    rows = [{"prompt": text(16, 160), "chosen": text(8, 320), "rejected": text(8, 320)} for _ in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path) -> None:
    """Export random weights, with a tokenizer of bytes, by a step with a learning rate of 0."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    entry = Path(__file__).resolve().parent.parent / "finetune_deepseek.py"
    command = [sys.executable, str(entry), "--model", str(folder / "config.json"), "--dataset",
               str(folder / "pairs.jsonl"), "--objective", "orpo", "--tokenizer-type", "ByteTokenizer", "--template",
               "deepseek-v3", "--seq-length", str(SEQ_LENGTH), "--micro-batch-size", "1", "--global-batch-size", "1",
               "--train-iters", "1", "--lr", "0", "--save", str(folder / "save"), "--save-hf", str(folder / "model")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ours(folder: Path, steps: int, micro_batch: int) -> dict:
    """Return losses and processor seconds of steps on packed rows; `micro_batch` is of rows."""
    import torch

    from megatron_deepseek.checkpoint.job import distributed as checkpoint
    from megatron_deepseek.data.batches import Sampler
    from megatron_deepseek.fine_tuning_settings import PreferenceSettings
    from megatron_deepseek.finetuning.preference.completion import weighted_scores
    from megatron_deepseek.finetuning.preference.inputs import PreferenceSampler
    from megatron_deepseek.finetuning.preference.objectives import REFERENCE, preference_objective
    from megatron_deepseek.finetuning.prepare import prepare
    from megatron_deepseek.finetuning.rows import Rows
    from megatron_deepseek.finetuning.settings import PAIRS, DataSettings
    from megatron_deepseek.model.architecture.config import ModelConfig
    from megatron_deepseek.model.build import BuildOptions, Precision
    from megatron_deepseek.parallel.layout import Layout
    from megatron_deepseek.parallel.layout_string import Stage
    from megatron_deepseek.parallel.mesh import build_meshes
    from megatron_deepseek.parallel.start import join_job
    from megatron_deepseek.settings import OptimizerSettings
    from megatron_deepseek.training.trainer import Trainer, TrainingSpec

    device = torch.device("cpu")
    join_job(device, 10.0)
    data = DataSettings((str(folder / "pairs.jsonl"),), tokenizer_model=str(folder / "model"), template="deepseek-v3",
                        seq_length=SEQ_LENGTH, kind=PAIRS, num_workers=1, data_cache_path=str(folder / "cache"))
    rows, model = Rows(prepare(data, lambda line: None), epochs=1), ModelConfig.from_file(folder / "model")
    whole = Stage(True, tuple(range(model.num_hidden_layers)), (), True)
    optimizer = OptimizerSettings(adam_beta2=BETA2, weight_decay=0.0, clip_grad=CLIP)
    spec = TrainingSpec(model, (whole,), "1F1B", SEQ_LENGTH, micro_batch, BuildOptions(precision=Precision()),
                        optimizer)
    trainer = Trainer(spec, build_meshes(Layout(), device), preference_objective(PreferenceSettings("dpo", BETA)))
    checkpoint.load_weights(folder / "model", trainer.stages)
    number = -(-rows.rows_per_epoch // micro_batch) * micro_batch
    batch = PreferenceSampler(Sampler(rows, model.vocab_size, "--dataset"), rows, None).batch(0, number, micro_batch)
    batch = replace(batch, per_token={**batch.per_token, REFERENCE: weighted_scores(trainer, batch)})
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.process_time()
        losses.append(trainer.train_step(batch, LEARNING_RATE).losses.reports["dpo_loss"])
        seconds.append(time.process_time() - begin)
    return {"losses": losses, "seconds": seconds, "positions": number * SEQ_LENGTH}


def trl(folder: Path, steps: int, micro_batch: int) -> dict:
    """Return losses and processor seconds of TRL's steps; `micro_batch` is of pairs."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *args, **kwargs):
            self.begin = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.process_time() - self.begin)

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{**row, "prompt": PREFIX + row["prompt"] + ASKED} for row in rows])
    config = DPOConfig(
        output_dir=str(folder / "trl"), beta=BETA, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        adam_beta2=BETA2, weight_decay=0.0, max_grad_norm=CLIP, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(rows) // micro_batch, max_steps=steps, logging_steps=1, report_to="none",
        save_strategy="no", precompute_ref_log_probs=True, max_length=SEQ_LENGTH, gradient_checkpointing=False,
        bf16=False, use_cpu=True, dataloader_num_workers=0, disable_tqdm=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    clock = Clock()
    trainer = DPOTrainer(model, args=config, train_dataset=data, callbacks=[clock],
                         processing_class=AutoTokenizer.from_pretrained(folder / "model"))
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"losses": losses, "seconds": clock.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", type=Path, help="the Python that has TRL")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1, help="of our micro-batch (1)")
    parser.add_argument("--trl-pairs", type=int, default=4, help="of TRL's micro-batch (4)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        run, micro_batch = {"ours": (ours, args.rows), "trl": (trl, args.trl_pairs)}[args.side]
        found = run(args.folder, args.steps, micro_batch)
        (args.folder / f"{args.side}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl", args.pairs)
        write_model(folder)
        found = {}
        for side, python in (("ours", sys.executable), ("trl", str(args.trl_python))):
            subprocess.run([python, __file__, "--side", side, "--folder", name, *sys.argv[1:]], check=True)
            found[side] = json.loads((folder / f"{side}.json").read_text())
    for side, record in found.items():
        record["median_seconds"] = statistics.median(record["seconds"][1:])
        print(f"{side:5} {record['median_seconds']:.3f} processor seconds a step; losses "
              + " ".join(f"{loss:.4f}" for loss in record["losses"]))
    print(f"TRL takes {found['trl']['median_seconds'] / found['ours']['median_seconds']:.2f} times as long")
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
