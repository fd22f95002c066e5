#!/usr/bin/env python3
"""Bytes per second and peak memory of hf -> native -> hf, beside `cp -r` and transformers' save_pretrained.

The model has V3's shapes (all 128 heads, experts of 7168 x 2048) in two layers, the first dense, or below 2.5 GB in one
layer with experts; it has as many experts as --gigabytes ask for. Every command runs in its own process. Bytes are
those of the model, counted once: the bytes read or the bytes written. The time of --help is the tool's start-up, which
is part of its other times. Disks stall after a lot of writing; --rounds repeats everything, and the best of each is
printed with all.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_deepseek.checkpoint.convert.names import hf_shapes  # noqa: E402
from megatron_deepseek.model.architecture.presets import V3  # noqa: E402

SAVE_PRETRAINED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="1GB")
"""
FILE_BYTES = 10**9


@dataclass(frozen=True)
class Measured:
    """One command. `cpu_seconds` are its user and system time, `error` its stderr."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    error: str


def generate(directory: Path, gigabytes: float) -> int:
    """Write the model's files, of about 1 GB each, and return their size in bytes.

    Run it in a process of its own: the peak memory of a command begins at that of the process that starts it.
    """
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    layers = 2 if gigabytes >= 2.5 else 1
    rest = hf_shapes(_config(2, layers))
    fixed = 2 * sum(math.prod(shape) for name, shape in rest.items() if ".experts." not in name)
    one_expert = 2 * 3 * V3.hidden_size * V3.moe_intermediate_size
    config = _config(max(2, round((gigabytes * 1e9 - fixed) / one_expert)), layers)
    (directory / "config.json").write_text(json.dumps(config.to_hf_dict()))
    pending, size, number = {}, 0, 0
    for name, shape in hf_shapes(config).items():
        pending[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        size += pending[name].nbytes
        if sum(tensor.nbytes for tensor in pending.values()) > FILE_BYTES:
            save_file(pending, directory / f"part-{number}.safetensors", metadata={"format": "pt"})
            pending, number = {}, number + 1
    if pending:
        save_file(pending, directory / f"part-{number}.safetensors", metadata={"format": "pt"})
    return size


def _config(experts: int, layers: int):
    return replace(V3, num_hidden_layers=layers, first_k_dense_replace=layers - 1, n_routed_experts=experts, n_group=1,
                   topk_group=1, num_experts_per_tok=2, vocab_size=8192, num_nextn_predict_layers=0, rope_scaling=None)


def measure(command: list[str]) -> Measured:
    """Run a command to its end and return its times and its peak of resident memory."""
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{error[-2000:]}")
    return Measured(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, error)


def one_round(directory: Path, workers: int) -> dict[str, list[Measured]]:
    """Run each command once, with a `cp` of the model before each, and the tool's start-up alone."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), "--workers", str(workers)]
    hf, native, back = (str(directory / name) for name in ("hf", "native", "back"))
    commands = {
        "hf -> native": [*tool, "--from", "hf", "--to", "native", "--load", hf, "--save", native],
        "native -> hf": [*tool, "--from", "native", "--to", "hf", "--load", native, "--save", back],
        "save_pretrained": [sys.executable, "-c", SAVE_PRETRAINED, back, str(directory / "theirs")],
    }
    results = {"cp -r": [], "--help": [measure([*tool[:2], "--help"])]}
    for name, command in commands.items():
        results["cp -r"].append(measure(["cp", "-r", hf, str(directory / "copy")]))
        shutil.rmtree(directory / "copy")
        results[name] = [measure(command)]
        used = {"native -> hf": "native", "save_pretrained": "theirs"}.get(name)
        if used:
            shutil.rmtree(directory / used)
    shutil.rmtree(directory / "back")
    return results


def fp8_round(directory: Path, workers: int) -> dict[str, list[Measured]]:
    """Convert to FP8 and from it, each once."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), "--workers", str(workers)]
    hf, fp8, native, back = (str(directory / name) for name in ("hf", "fp8", "native", "back"))
    commands = {
        "bf16 -> fp8": ["--from", "hf", "--to", "hf", "--load", hf, "--save", fp8, "--dtype", "fp8"],
        "fp8 -> native": ["--from", "hf", "--to", "native", "--load", fp8, "--save", native],
        "native -> fp8": ["--from", "native", "--to", "hf", "--load", native, "--save", back, "--dtype", "fp8"]}
    results = {"--help": [measure([*tool[:2], "--help"])]}
    results |= {name: [measure([*tool, *command])] for name, command in commands.items()}
    for name in (fp8, native, back):
        shutil.rmtree(name)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fp8", action="store_true", help="to FP8 and back instead; bytes are those of bf16")
    parser.add_argument("--directory", type=Path, help="where the files go; needs three times the size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        directory = Path(scratch)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size = pool.apply(generate, (directory / "hf", args.gigabytes))
        print(f"{size:,} bytes, {args.workers} workers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        one = fp8_round if args.fp8 else one_round
        rounds = [one(directory, args.workers) for _ in range(args.rounds)]
    for name in rounds[0]:
        times = [measured for results in rounds for measured in results[name]]
        rates = "" if name == "--help" else f"{size / min(each.seconds for each in times) / 1e6:5.0f} MB/s, "
        seconds = [each.seconds for each in times]
        print(f"{name:16s} best {rates}{min(seconds):.2f} s of {' '.join(f'{each:.2f}' for each in seconds)}; "
              f"CPU {min(each.cpu_seconds for each in times):.1f} s; "
              f"peak resident {max(each.peak_bytes for each in times) / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
