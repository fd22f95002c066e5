#!/usr/bin/env python3
"""Base weights in fewer bits beside LoRA: what they cost on a CPU, and what reading them takes.

    dequantise   NF4 made plain, beside bitsandbytes' own CPU code if that is installed (pip install bitsandbytes)
    step         a training step of adapters with the base in bfloat16, FP8 and NF4, in turn
    load         the most memory while a base is read, above what the model then takes, and its largest matrix

Everything is processor time of one thread, so that other work on the machine counts little: the least of --rounds.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

from megatron_deepseek.checkpoint.convert.names import hf_shapes  # noqa: E402
from megatron_deepseek.checkpoint.job.adapters import load_with_base  # noqa: E402
from megatron_deepseek.data.batch import Batch  # noqa: E402
from megatron_deepseek.model.architecture.adapters import LoraSettings  # noqa: E402
from megatron_deepseek.model.architecture.base_weights import BaseSettings  # noqa: E402
from megatron_deepseek.model.architecture.config import ModelConfig  # noqa: E402
from megatron_deepseek.model.build import BuildOptions, Precision  # noqa: E402
from megatron_deepseek.ops import nf4  # noqa: E402
from megatron_deepseek.parallel.layout import Layout  # noqa: E402
from megatron_deepseek.parallel.mesh import build_meshes  # noqa: E402
from megatron_deepseek.planning.pipeline_balance import resolve  # noqa: E402
from megatron_deepseek.settings import PipelineSettings  # noqa: E402
from megatron_deepseek.training.trainer import Trainer, TrainingSpec  # noqa: E402

FORMS = {"bf16": None, "fp8": BaseSettings(8), "nf4": BaseSettings(4), "nf4, plain scales": BaseSettings(4, False)}
LORA = LoraSettings(8, 16.0)
CPU, LENGTH, ROWS = torch.device("cpu"), 128, 2
MODEL = ModelConfig(
    vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    kv_lora_rank=128, q_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    moe_intermediate_size=256, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5)
LARGE = ModelConfig(
    vocab_size=1024, hidden_size=4096, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=8,
    kv_lora_rank=128, q_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, first_k_dense_replace=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of which the fastest counts (7)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dequantise(rounds)
    with tempfile.TemporaryDirectory() as directory:
        step(rounds, write(MODEL, Path(directory) / "model"))
        load(write(LARGE, Path(directory) / "large"))


def dequantise(rounds: int) -> None:
    """Print nanoseconds for each number, and whether both give the same numbers."""
    x = torch.randn(1408, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    held = nf4.quantize(x)
    for dtype in (torch.float32, torch.bfloat16):
        runs = {"here": partial(nf4.dequantize, held, dtype),
                "here, scales quantised": partial(nf4.dequantize, held.with_double_scales(), dtype)}
        try:
            from bitsandbytes import functional
        except ImportError:
            print("bitsandbytes is not installed")
        else:
            codes, state = functional.quantize_4bit(x.to(dtype), blocksize=64, quant_type="nf4")
            runs["bitsandbytes"] = partial(functional.dequantize_4bit, codes, state)
            alike = torch.equal(nf4.dequantize(nf4.quantize(x.to(dtype)), dtype), runs["bitsandbytes"]())
            print(f"dequantise {str(dtype):14}  the same numbers as bitsandbytes: {alike}")
        for name, seconds in fastest(runs, rounds).items():
            print(f"dequantise {str(dtype):14}  {name:24} {seconds / x.numel() * 1e9:6.2f} ns a number")


def fastest(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Return the least processor seconds of each, which take turns; the first round is not counted."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            seconds[name].append(time.process_time() - begun)
    return {name: min(each[1:]) for name, each in seconds.items()}


def write(config: ModelConfig, directory: Path) -> Path:
    """Write random weights in bfloat16 as a Hugging Face directory."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file({name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
               for name, shape in hf_shapes(config).items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config.to_hf_dict()))
    return directory


def trainer_of(config: ModelConfig, form: str) -> Trainer:
    build = BuildOptions(precision=Precision(torch.float32, torch.bfloat16), lora=LORA, base=FORMS[form])
    stages = resolve(config, PipelineSettings(), 1, LENGTH)
    return Trainer(TrainingSpec(config, stages, "none", LENGTH, ROWS, build), build_meshes(Layout(), CPU))


def step(rounds: int, directory: Path) -> None:
    """Print the processor time of a step of each form, and its loss."""
    tokens = torch.randint(MODEL.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens_BS=tokens[:, :-1], labels_BS=tokens[:, 1:], weights_BS=torch.ones(ROWS, LENGTH))
    runs, losses, taken = {}, {}, {}
    for form in FORMS:
        trainer = trainer_of(MODEL, form)
        load_with_base(directory, trainer.stages, None, CPU)
        losses[form] = trainer.evaluate(batch).lm_loss
        taken[form] = sum(p.to_local().nbytes for p in trainer.stages[0].parameters() if not p.requires_grad)
        runs[form] = partial(trainer.train_step, batch, 1e-4)
    found = fastest(runs, rounds)
    for form, seconds in found.items():
        print(f"step {form:18} {seconds:6.3f} s, {seconds / found['bf16']:.2f} of bf16; base "
              f"{taken[form] / 2**20:6.1f} MiB; first loss {losses[form]:.5f}")


def load(directory: Path) -> None:
    """Print, of a process of its own for each form, the peak of memory above what stays, beside the largest matrix."""
    largest = max(prod(shape) for shape in hf_shapes(LARGE).values()) * 2
    for form in FORMS:
        with get_context("spawn").Pool(1) as pool:
            above = pool.apply(peak_of_load, (directory, form))
        print(f"load {form:18} {above / 2**20:6.0f} MiB at most above what stays; largest matrix, as it is stored, "
              f"{largest / 2**20:.0f} MiB")


def peak_of_load(directory: Path, form: str) -> int:
    """Return the bytes by which memory rose above what the model took once it was built and written to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = trainer_of(LARGE, form)
    for parameter in trainer.stages[0].parameters():
        parameter.to_local().detach().zero_()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    load_with_base(directory, trainer.stages, None, CPU)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


if __name__ == "__main__":
    main()
