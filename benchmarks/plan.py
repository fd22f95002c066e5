#!/usr/bin/env python3
"""Seconds and memory of tools/plan.py: memory, time and search of V3 on 2,048 GPUs, in processes of their own,
least of several."""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {
    "memory of V3 on 2,048 ranks": "memory --model deepseek-v3 --world-size 2048 --gpu h800 --bf16 --fp8-format e4m3 "
    "--pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV --expert-model-parallel-size 64 "
    "--global-batch-size 15360 --recompute-granularity selective",
    "time of V3 on 2,048 ranks": "time --model deepseek-v3 --world-size 2048 --gpu h800 --bf16 --fp8-format e4m3 "
    "--pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV --expert-model-parallel-size 64 "
    "--global-batch-size 15360",
    "search of V3 on 2,048 ranks": "search --model deepseek-v3 --world-size 2048 --gpu h800 --bf16 --fp8-format e4m3 "
    "--global-batch-size 15360",
    "docs/planning.md": "table"}


def measured(arguments: str) -> tuple[float, float, float]:
    """Return seconds of the wall, of the processor, and the largest MB of any process until now."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, REPOSITORY / "tools/plan.py", *arguments.split()], check=True,
                   stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            after.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(f"{'':30} {'seconds':>8} {'processor':>10} {'MB':>6}")
    for name, arguments in COMMANDS.items():
        runs = [measured(arguments) for _ in range(repeats)]
        print(f"{name:30} {min(run[0] for run in runs):8.2f} {min(run[1] for run in runs):10.2f} {runs[-1][2]:6.0f}")


if __name__ == "__main__":
    main()
