#!/usr/bin/env python3
"""A step of LoRA on a small DeepSeek-V3, here and by PEFT with transformers, from the same weights and adapters.

    OMP_NUM_THREADS=1 python benchmarks/lora_step.py [--bf16] [--target attention mlp] [--output FILE]

Both run in this process with the same threads and take turns. A step is forward, backward, clipping, and fused AdamW on
the adapters. PEFT is not installed by default: python -m pip install '.[engines]'. It adapts attention as modules; MLPs
and experts can be adapted without losses as parameters alone (docs/lora.md). The first losses must be equal to 1e-5
(--bf16: 1e-2, as transformers computes under autocast); later ones part where experts are adapted, since PEFT trains
the zeros of its fused gate and up as well. Processor seconds say more than the clock where other work runs. Memory is
by how much two steps, the first ones, raise the memory of a process with that side alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from train_step import MODEL, Theirs, deepseek_v3

from megatron_deepseek.checkpoint.adapter.export import adapter_places
from megatron_deepseek.checkpoint.adapter.peft_config import peft_config
from megatron_deepseek.checkpoint.adapter.peft_files import CONFIG, PREFIX, WEIGHTS
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.architecture.adapters import B, LoraSettings, factor_of, is_adapter
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.init import fill_normal
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import join_job
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LEARNING_RATE = 1e-4
OPTIMIZER = OptimizerSettings(weight_decay=0.0)
SIDES = ("ours", "peft")


class Ours:
    def __init__(self, model, lora: LoraSettings, args: argparse.Namespace):
        whole = Stage(True, tuple(range(model.num_hidden_layers)), (), True)
        build = BuildOptions(precision=Precision(torch.float32, torch.bfloat16 if args.bf16 else None), lora=lora)
        spec = TrainingSpec(model, (whole,), "1F1B", args.seq_length, args.batch, build, OPTIMIZER)
        self.trainer = Trainer(spec, build_meshes(Layout(), torch.device("cpu")))
        for name, parameter in self.trainer.stages[0].named_parameters():
            if factor_of(name) == B:
                fill_normal(parameter, 0.02, 0, name)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().clone()
                for name, parameter in self.trainer.stages[0].named_parameters()}

    def step(self, tokens: torch.Tensor) -> float:
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        batch = Batch(tokens_BS=inputs, labels_BS=labels, weights_BS=torch.ones_like(labels, dtype=torch.float32))
        return self.trainer.train_step(batch, LEARNING_RATE).losses.lm_loss


class Peft(Theirs):
    """transformers' model with our weights, in PEFT with our adapters; `step` is that of train_step.py."""

    def __init__(self, model, lora: LoraSettings, weights: dict[str, torch.Tensor], args: argparse.Namespace):
        import peft

        super().__init__(replace_size(deepseek_v3(args.experts), model),
                         {name: tensor for name, tensor in weights.items() if not is_adapter(name)}, args.bf16)
        with tempfile.TemporaryDirectory() as name:
            write_adapter(Path(name), model, lora, weights)
            self.model = peft.PeftModel.from_pretrained(self.model, name, is_trainable=True)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, eps=OPTIMIZER.adam_eps,
                                           betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), fused=True)


def replace_size(made: torch.nn.Module, model) -> torch.nn.Module:
    """Return a model of another vocabulary than train_step.py's."""
    made.resize_token_embeddings(model.vocab_size)
    return made


def write_adapter(directory: Path, model, lora: LoraSettings, weights: dict[str, torch.Tensor]) -> None:
    """Write our adapters as PEFT's files."""
    tensors = {}
    for place in adapter_places(model, lora):
        part = tuple(slice(start, start + size) for start, size in zip(place.offset, place.extent))
        tensors[PREFIX + place.name] = weights[place.whole][part].reshape(place.shape).contiguous()
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(peft_config(model, lora, "base")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bf16", action="store_true", help="ours with --bf16, transformers under autocast")
    add("--target", nargs="+", default=["attention"], help="as --lora-target (attention)")
    add("--rank", type=int, default=8)
    add("--vocab-size", type=int, default=1024)
    add("--batch", type=int, default=4)
    add("--seq-length", type=int, default=256)
    add("--steps", type=int, default=8)
    add("--output", type=Path, help="add the figures, as JSON, to the list in this file")
    add("--experts", default="eager", help="transformers' implementation of experts: eager, grouped_mm (eager)")
    add("--alone", nargs=2, metavar=("SIDE", "WEIGHTS"), help="print the memory of two steps of one side")
    return parser.parse_args()


def make(name: str, args: argparse.Namespace, weights: dict[str, torch.Tensor] | None = None):
    """Return one of SIDES; PEFT's has the `weights` of ours."""
    model = replace(MODEL, vocab_size=args.vocab_size)
    lora = LoraSettings(args.rank, 2.0 * args.rank, tuple(args.target))
    return Ours(model, lora, args) if name == "ours" else Peft(model, lora, weights, args)


def batches(args: argparse.Namespace) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(torch.randint(0, args.vocab_size, (args.steps + 1, args.batch, args.seq_length + 1)))


def memory_of_two_steps(args: argparse.Namespace) -> int:
    """Return by how many bytes the first two steps raise this process's memory."""
    name, file = args.alone
    side = make(name, args, torch.load(file, mmap=True) if name == "peft" else None)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for tokens in batches(args)[:2]:
        side.step(tokens)
    return status("VmHWM") - before


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def timed(step, tokens: torch.Tensor) -> tuple[float, float, float]:
    begin = time.perf_counter(), time.process_time()
    loss = step(tokens)
    return time.perf_counter() - begin[0], time.process_time() - begin[1], loss


def figures(args: argparse.Namespace) -> dict:
    import peft
    import transformers

    found = {"target": " ".join(args.target), "rank": args.rank, "dtype": "bf16" if args.bf16 else "fp32",
             "batch": args.batch, "seq_length": args.seq_length, "vocab_size": args.vocab_size, "steps": args.steps,
             "threads": torch.get_num_threads(), "experts": args.experts,
             "versions": [torch.__version__, peft.__version__, transformers.__version__]}
    ours, size = make("ours", args), args.batch * args.seq_length
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(ours.weights(), file.name)
        memory = {name: run_alone(name, file.name) for name in SIDES}
    made = {"ours": ours, "peft": make("peft", args, ours.weights())}
    runs = [{name: timed(side.step, tokens) for name, side in made.items()} for tokens in batches(args)]
    for name in SIDES:
        wall, cpu = (statistics.median(run[name][clock] for run in runs[1:]) for clock in (0, 1))
        found[name] = {"tokens_per_second": round(size / wall), "tokens_per_processor_second": round(size / cpu),
                       "memory_of_two_steps": memory[name], "losses": [run[name][2] for run in runs]}
    ours, theirs = (found[name] for name in SIDES)
    found["ratio"] = round(ours["tokens_per_second"] / theirs["tokens_per_second"], 2)
    found["ratio_by_processor"] = round(ours["tokens_per_processor_second"] / theirs["tokens_per_processor_second"], 2)
    found["first_losses_differ"] = abs(ours["losses"][0] - theirs["losses"][0])
    return found


def run_alone(name: str, weights: str) -> int:
    command = [sys.executable, *sys.argv, "--alone", name, weights]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> None:
    args = arguments()
    join_job(torch.device("cpu"), 10)
    if args.alone:
        print(memory_of_two_steps(args))
        return
    found = figures(args)
    for name, value in found.items():
        print(f"{name:22s} {value}")
    if args.output:
        before = json.loads(args.output.read_text()) if args.output.exists() else []
        args.output.write_text(json.dumps([*before, found], indent=1) + "\n")
    dist.destroy_process_group()
    if found["first_losses_differ"] > (1e-2 if args.bf16 else 1e-5):
        sys.exit("the first losses differ")


if __name__ == "__main__":
    main()
