#!/usr/bin/env python3
"""Seconds from the command to the first step of `make pretrain`'s job, beside the least that such processes need.

    python benchmarks/start.py [--run-dir runs/tiny] [--rounds 3] [--nproc 4]

The run directory is one of `make pretrain`: its dataset and tokenizer are read, nothing in it is written. "job" is
examples/pretrain_tiny.sh up to its line of iteration 1. "floor" is torchrun with as many processes that import torch's
FSDP and pipelines, form a gloo group and wait for each other. They take turns. Processor seconds are those of all
processes together up to that line: on a busy machine they are what to read. The first round of each also reads files
from the disk.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FLOOR = """
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.pipelining
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 0:
    print("iteration 1/1", flush=True)
dist.barrier()
dist.destroy_process_group()
"""
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(root: int) -> float:
    """Return the processor time of a process and of all its descendants, those that have ended included."""
    ticks, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))  # its own, and of children waited for
    return sum(own for pid, own in ticks.items() if root in _ancestors(pid, parents)) / TICKS


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    line = set()
    while pid in parents and pid not in line:
        line.add(pid)
        pid = parents[pid]
    return line


def first_step(command: list[str], environ: dict[str, str]) -> tuple[float, float]:
    """Return the seconds and processor seconds of a command up to its line of iteration 1, and let it end."""
    begin = time.perf_counter()
    with subprocess.Popen(command, env=environ, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        printed, figures = [], None
        for line in process.stdout:
            printed.append(line)
            if figures is None and "iteration 1/" in line and "validation" not in line:
                figures = time.perf_counter() - begin, processor_seconds(process.pid)
    if process.returncode or figures is None:
        raise SystemExit(f"{command[0]} {command[1]} ended with {process.returncode}:\n{''.join(printed[-20:])}")
    return figures


def surroundings(**variables: str) -> dict[str, str]:
    """Return the environment with these variables, and with bytecode kept, without which no start is warm."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | variables


def job(args: argparse.Namespace, scratch: Path) -> tuple[float, float]:
    """Start examples/pretrain_tiny.sh on the data of the run directory."""
    data = args.run_dir.resolve() / "data"
    environ = surroundings(
        RUN_DIR=str(scratch), DATA_PATH=str(data / "corpus_text_document"), TOKENIZER=str(data / "tokenizer.json"),
        STEPS="1", NPROC=str(args.nproc), PYTHON=sys.executable)
    return first_step(["bash", "examples/pretrain_tiny.sh", "--data-cache-path", str(data / "cache"),
                       "--eval-iters", "0"], environ)


def floor(args: argparse.Namespace, scratch: Path) -> tuple[float, float]:
    """Start torchrun with processes that do nothing but form a group."""
    (scratch / "floor.py").write_text(FLOOR)
    return first_step([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                       str(args.nproc), str(scratch / "floor.py")], surroundings(OMP_NUM_THREADS="1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=REPOSITORY / "runs/tiny", help="of make pretrain (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nproc", type=int, default=4)
    args = parser.parse_args()
    if not (args.run_dir / "data/tokenizer.json").exists():
        parser.error(f"--run-dir {args.run_dir} has no data/tokenizer.json; make pretrain makes it")
    best = {}
    for _ in range(args.rounds):
        for kind in (floor, job):
            with tempfile.TemporaryDirectory() as scratch:
                wall, processor = kind(args, Path(scratch))
            print(f"{kind.__name__:6s} {wall:6.2f} s, {processor:6.2f} s of processor time", flush=True)
            least = best.get(kind, (wall, processor))
            best[kind] = min(wall, least[0]), min(processor, least[1])
    (of_wall, of_processor), (wall, processor) = best[floor], best[job]
    print(f"least: job {wall:.2f} s, {wall / of_wall:.2f} of the floor; {processor:.2f} s of processor time, "
          f"{processor / of_processor:.2f} of the floor's")


if __name__ == "__main__":
    main()
