#!/usr/bin/env python3
"""Bytes per second and peak memory of tools/reshard_checkpoint.py, beside `cp -r` of the same checkpoint.

The checkpoint has the kinds of layers of V3, weights and two moments in float32, in the files of four ranks (TP 2,
DP 2, EP 4). Every command runs in a process of its own, in turn with `cp`; a first round warms up memory and is not
counted. Each command has two rates: that of its own work, as it measures it, and that from its start to its end, which
includes the import of torch (seconds). Bytes are those of the checkpoint, counted once. On a machine with other load
compare CPU seconds.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from convert import measure  # noqa: E402

# Starts the tool and prints how long it took once everything was imported.
TIMED = """
import sys, time
from megatron_deepseek.cli import target_layout
from megatron_deepseek.cli.reshard_checkpoint import main
begin, cpu = time.perf_counter(), time.process_time()
status = main(sys.argv[1:])
print(f"seconds {time.perf_counter() - begin} {time.process_time() - cpu}", file=sys.stderr)
sys.exit(status)
"""
KINDS = {
    "dp 4": ("reshard", "--data-parallel-size", "4"),
    "dp 4, not verified first": ("reshard", "--data-parallel-size", "4", "--no-verify"),
    "tp 4, ep 4, not verified first": ("reshard", "--tensor-model-parallel-size", "4", "--expert-model-parallel-size",
                                       "4", "--no-verify"),
    "one file, not verified first": ("merge", "--no-verify"),
}


@dataclass(frozen=True)
class Rate:
    """One command: bytes per second of the work and of the whole, processor seconds of the work, peak memory in bytes.
    """

    work: float
    command: float
    cpu_seconds: float
    peak_bytes: int


def generate(directory: Path, gigabytes: float) -> int:
    from native import write_checkpoint
    return write_checkpoint(directory, gigabytes)


def one_round(source: Path, save: Path, workers: int) -> dict[str, list[Rate]]:
    """Run each kind once, with a `cp` before each; `save` must not exist."""
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    results: dict[str, list[Rate]] = {"cp -r": []}
    for kind, arguments in KINDS.items():
        copied = measure(["cp", "-r", str(source), str(save)])
        results["cp -r"].append(Rate(size / copied.seconds, size / copied.seconds, copied.cpu_seconds,
                                     copied.peak_bytes))
        shutil.rmtree(save)
        done = measure([sys.executable, "-c", TIMED, *arguments, "--load", str(source), "--save", str(save),
                        "--workers", str(workers)])
        seconds, cpu_seconds = map(float, re.search(r"seconds (\S+) (\S+)", done.error).groups())
        results[kind] = [Rate(size / seconds, size / done.seconds, cpu_seconds, done.peak_bytes)]
        shutil.rmtree(save)
    return results


def measure_rounds(source: Path, save: Path, workers: int, rounds: int) -> None:
    """Print the rates of each kind over `rounds`, after a round that is not counted."""
    counted = [one_round(source, save, workers) for _ in range(rounds + 1)][1:]
    copied = max(rate.work for results in counted for rate in results["cp -r"])
    for kind in counted[0]:
        rates = [rate for results in counted for rate in results[kind]]
        work = [rate.work for rate in rates]
        print(f"{kind:32s} best {max(work) / 1e6:5.0f} MB/s ({max(work) / copied:4.0%} of the best cp) of "
              f"{' '.join(f'{each / 1e6:.0f}' for each in work)}; with start-up "
              f"{max(rate.command for rate in rates) / 1e6:.0f}; CPU {min(rate.cpu_seconds for rate in rates):.1f} s; "
              f"peak resident {max(rate.peak_bytes for rate in rates) / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the files go; needs twice the size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        with get_context("spawn").Pool(1) as pool:
            size = pool.apply(generate, (Path(scratch) / "source", args.gigabytes))
        print(f"{size:,} bytes, {args.workers} workers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        measure_rounds(Path(scratch) / "source", Path(scratch) / "out", args.workers, args.rounds)


if __name__ == "__main__":
    main()
