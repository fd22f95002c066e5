"""Ranks die at random points of training and saving; torchrun starts them again, and nothing of it shows at the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from workshop import REPOSITORY

from megatron_deepseek.checkpoint.integrity import verify_directory
from megatron_deepseek.checkpoint.marker import find_iteration, iterations, last_iteration, leftovers

ITERATIONS, DEATHS = 6, 3
# What a rank may be doing when it dies, and at which of its calls at most: all within the first saves of a life.
MOMENTS = {0: {"step": 3, "write": 60, "fsync": 8, "rename": 2, "replace": 5}, 1: {"step": 3, "write": 60, "fsync": 2}}


def deaths(seed: int) -> list[tuple[int, str, int]]:
    """For each life its end: rank, what it was about to do, and for the how manieth time."""
    draw, plan = random.Random(seed), []
    for _ in range(DEATHS):
        rank = draw.choice(sorted(MOMENTS))
        what = draw.choice(sorted(MOMENTS[rank]))
        plan.append((rank, what, draw.randint(1, MOMENTS[rank][what])))
    return plan


def train(workshop, name: str, plan: list, *more: str) -> str:
    """A job of two ranks that restarts by itself; what it printed. It must end well, after all planned deaths."""
    path = workshop.directory / f"{name}.json"
    path.write_text(json.dumps(plan))
    arguments = workshop.arguments(name, "--train-iters", str(ITERATIONS), "--save-interval", "1", "--keep-last", "2",
                                   "--load", str(workshop.directory / name), *more)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts",
               str(DEATHS + 1), "--monitor-interval", "0.1", str(Path(__file__).parent / "drill.py"), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.run([*command, *arguments], env=environment, text=True, capture_output=True, timeout=300)
    assert job.returncode == 0, job.stdout + job.stderr
    died = [life for life in range(len(plan)) if path.with_name(f"{name}-died-{life}").exists()]
    assert died == list(range(len(plan))), f"{plan}: only {died} came to their end"
    return job.stdout + job.stderr


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read by DCP itself."""
    stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


@pytest.fixture(scope="module")
def undisturbed(workshop) -> Path:
    train(workshop, "undisturbed", [])
    return workshop.directory / "undisturbed"


@pytest.mark.parametrize("seed", [3])
def test_dies_and_ends_as_if_it_had_not(workshop, undisturbed, seed):
    """The same bits of weights and moments, and every iteration once in metrics.jsonl, with the same numbers."""
    root = workshop.directory / f"drill{seed}"
    output = train(workshop, root.name, deaths(seed), "--async-save")
    ours, theirs = (tensors(find_iteration(each, ITERATIONS)) for each in (root, undisturbed))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], output
    assert iterations(root) == [ITERATIONS - 1, ITERATIONS] and last_iteration(root) == ITERATIONS
    assert not leftovers(root) and verify_directory(find_iteration(root, ITERATIONS)) == []
    for record, reference in zip(workshop.metrics(root.name), workshop.metrics("undisturbed"), strict=True):
        timing = {"step_seconds", "tokens_per_second", "checkpoint_stall_seconds"}
        assert {name: value for name, value in record.items() if name not in timing} == {
            name: value for name, value in reference.items() if name not in timing}


def test_a_signal_to_one_rank_saves_and_ends_the_job(workshop):
    """SIGUSR1, as Slurm sends it: all ranks leave after the same step, with a checkpoint of it and status 0."""
    arguments = workshop.arguments("signalled", "--train-iters", "100000", "--eval-iters", "0")
    process = workshop.start(2, arguments)
    metrics = workshop.directory / "signalled" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(rank_process(process.pid, rank=1), signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    last = workshop.metrics("signalled")[-1]["iteration"]
    assert last_iteration(workshop.directory / "signalled") == last < 100000
    assert f"leaving after iteration {last}" in output and f"saved {workshop.directory}/signalled/iter_" in output


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank among torchrun's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"rank {rank} is not running")
