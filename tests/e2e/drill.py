#!/usr/bin/env python3
"""The fault drill: training jobs whose ranks are killed at random moments and started again, against undisturbed ones.

    python tests/e2e/drill.py --seeds 20                      deaths drawn from the seeds; layouts and saves take turns
    python tests/e2e/drill.py --seeds 5 --layouts pp --torchrun       with torchrun's own restarts

A job ends as if nothing had happened, or the drill says what is different and ends with status 1: the last checkpoint
has the same bits, metrics.jsonl the same lines (but for times), and after each death whatever the marker names is
whole. Jobs are forked from here, where everything is imported, so that a life takes a second or two.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from mortal import MOMENTS, Death, draw_deaths, obituary, train, write_plan  # noqa: E402
from workshop import REPOSITORY, Workshop, make_workshop  # noqa: E402

from megatron_deepseek.checkpoint.integrity import verify_directory  # noqa: E402
from megatron_deepseek.checkpoint.marker import (  # noqa: E402
    begins_anew,
    find_iteration,
    iterations,
    last_iteration,
    leftovers,
    problem,
)

RANKS, KEEP = 2, 2
LAYOUTS = {"dp": (), "tp": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
           "pp": ("--pipeline-model-parallel-size", "2"), "ep": ("--expert-model-parallel-size", "2"),
           "cp": ("--context-parallel-size", "2")}
SAVES = {"sync": (), "async": ("--async-save",)}
TIMES = ("step_seconds", "tokens_per_second", "checkpoint_stall_seconds")


@dataclass(frozen=True)
class Drill:
    """One job: which layout and kind of save, and how each of its lives but the last ends."""

    name: str
    layout: str
    saves: str
    iterations: int
    deaths: tuple[Death, ...] = ()

    def arguments(self, workshop: Workshop) -> list[str]:
        root = str(workshop.directory / self.name)
        return workshop.arguments(self.name, "--train-iters", str(self.iterations), "--global-batch-size", "4",
                                  "--save-interval", "1", "--keep-last", str(KEEP), "--load", root,
                                  *LAYOUTS[self.layout], *SAVES[self.saves])


def draw_drill(seed: int, args: argparse.Namespace) -> Drill:
    turns = list(itertools.product(args.layouts, args.saves))
    layout, saves = turns[seed % len(turns)]
    return Drill(f"seed{seed}", layout, saves, args.iterations,
                 tuple(draw_deaths(random.Random(seed), args.deaths, RANKS)))


def planned_drills(args: argparse.Namespace) -> list[Drill]:
    if args.die:
        return [Drill(f"planned-{layout}-{saves}", layout, saves, args.iterations, tuple(args.die))
                for layout, saves in itertools.product(args.layouts, args.saves)]
    first = int(time.time()) if args.first_seed is None else args.first_seed
    print(f"--first-seed {first}", flush=True)
    return [draw_drill(seed, args) for seed in range(first, first + args.seeds)]


def run_forked(drill: Drill, workshop: Workshop) -> list[str]:
    """Life after life; what was found wrong on the way. Output goes to NAME.log."""
    root, plan, wrong = workshop.directory / drill.name, workshop.directory / f"{drill.name}.json", []
    for number, death in enumerate((*drill.deaths, None)):
        statuses = run_life(drill.arguments(workshop), death, obituary(plan, number), root.with_suffix(".log"))
        if statuses == [0] * RANKS:
            break
        if not obituary(plan, number).exists():
            wrong.append(f"life {number} ended by itself, statuses {statuses}")
            break
        wrong += [f"after life {number} ({death}): {text}" for text in damage(root)]
    return wrong


def damage(root: Path) -> list[str]:
    """Why the next life could not load what this one left behind."""
    if begins_anew(root):
        return []
    if problem(root) is not None:
        return [problem(root)]
    return list(map(str, verify_directory(find_iteration(root, last_iteration(root)))))


def run_life(arguments: list[str], death: Death | None, obituary: Path, log: Path) -> list[int]:
    """Exit statuses of the ranks, which are stopped once one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, port, arguments, death, obituary, log))
             for rank in range(RANKS)]
    for process in ranks:
        process.start()
    running = list(ranks)
    while running:
        wait([process.sentinel for process in running], timeout=120)
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in ranks) or len(running) == len(ranks):
            _stop(running, death is not None and death.merciful)
            running = []
    return [process.exitcode for process in ranks]


def _stop(processes: list, merciful: bool) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGTERM if merciful else signal.SIGKILL)
    for process in processes:
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join()


def _rank(rank: int, port: int, arguments: list[str], death: Death | None, obituary: Path, log: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(RANKS)}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    train(arguments, death, obituary)


def run_torchrun(drill: Drill, workshop: Workshop) -> list[str]:
    """The same under torchrun, which starts all ranks anew when one has died."""
    plan = workshop.directory / f"{drill.name}.json"
    write_plan(plan, drill.deaths)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS),
               "--max-restarts", str(len(drill.deaths) + 1), "--monitor-interval", "0.1",
               str(Path(__file__).with_name("mortal.py")), str(plan), *drill.arguments(workshop)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    with open(workshop.directory / f"{drill.name}.log", "w") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    return [f"torchrun ended with status {status}"] if status else []


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read by DCP itself."""
    stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no job
        dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


def differences(root: Path, undisturbed: Path, iteration: int) -> list[str]:
    """How what a job left under `root` differs from what one without deaths left."""
    if last_iteration(root) != iteration:
        return [f"ended at iteration {last_iteration(root)} instead of {iteration}"]
    wrong = damage(root)
    if iterations(root) != iterations(undisturbed) or leftovers(root):
        wrong.append(f"{root} holds {sorted(path.name for path in root.iterdir())}")
    ours, theirs = (tensors(find_iteration(each, iteration)) for each in (root, undisturbed))
    assert len(theirs) > 100, "an empty reference proves nothing"
    wrong += [f"{name} has other bits, or is not there" for name in ours.keys() | theirs.keys()
              if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])]
    return wrong + different_metrics(root, undisturbed)


def different_metrics(root: Path, undisturbed: Path) -> list[str]:
    ours, theirs = (_records(each / "metrics.jsonl") for each in (root, undisturbed))
    if len(ours) != len(theirs):
        return [f"metrics.jsonl has {len(ours)} lines instead of {len(theirs)}"]
    return [f"metrics.jsonl, line {number}: {own} instead of {other}"
            for number, (own, other) in enumerate(zip(ours, theirs), start=1) if own != other]


def _records(path: Path) -> list[dict]:
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in path.read_text().splitlines()]


class References:
    """The undisturbed job of each layout, run when it is first asked for."""

    def __init__(self, workshop: Workshop):
        self.workshop = workshop

    def root(self, layout: str, iterations: int) -> Path:
        root = self.workshop.directory / f"undisturbed-{layout}-{iterations}"
        if not root.exists():
            wrong = run_forked(Drill(root.name, layout, "sync", iterations), self.workshop)
            if wrong:
                sys.exit(f"the undisturbed job failed: {wrong}\n{root.with_suffix('.log').read_text()}")
        return root


def perform(drill: Drill, workshop: Workshop, references: References, torchrun: bool) -> tuple[list[Death], list[str]]:
    """The deaths that came about, and what was wrong afterwards."""
    undisturbed = references.root(drill.layout, drill.iterations)
    wrong = (run_torchrun if torchrun else run_forked)(drill, workshop)
    plan = workshop.directory / f"{drill.name}.json"
    died = [death for number, death in enumerate(drill.deaths) if obituary(plan, number).exists()]
    return died, wrong or differences(workshop.directory / drill.name, undisturbed, drill.iterations)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=10, metavar="N", help="jobs to run (10)")
    add("--first-seed", type=int, default=None, metavar="N", help="by the clock, and printed, if not given")
    add("--deaths", type=int, default=4, metavar="N", help="of each job (4)")
    add("--die", nargs="+", type=Death.parse, metavar="RANK:WHAT:COUNT", help="a life's end each, instead of drawn "
        f"ones; what: {', '.join(MOMENTS[0])} (milliseconds); it is wrong if one does not come about")
    add("--workshop", type=Path, metavar="DIR", help="a corpus and undisturbed jobs of an earlier drill (a new one)")
    add("--iterations", type=int, default=12, metavar="N", help="of each job (12), a checkpoint after each")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    add("--saves", nargs="+", choices=SAVES, default=list(SAVES))
    add("--torchrun", action="store_true", help="let torchrun restart the ranks, which takes longer")
    return parser


def report(drill: Drill, died: list[Death], wrong: list[str], seconds: float, workshop: Workshop) -> None:
    print(f"{drill.name} ({drill.layout}, {drill.saves}): {len(died)} deaths in {seconds:.0f} s: "
          f"{'; '.join(map(str, died))}", flush=True)
    if wrong:
        log = workshop.directory / f"{drill.name}.log"
        print("".join(f"  WRONG: {text}\n" for text in wrong[:5]) + f"  its output, {log}, ends with\n"
              + "".join(f"    {line}\n" for line in log.read_text().splitlines()[-30:]), flush=True)


def main() -> int:
    args = build_parser().parse_args()
    drills = planned_drills(args)
    workshop = make_workshop(args.workshop or Path(tempfile.mkdtemp(prefix="drill-")))
    references, deaths, failed = References(workshop), Counter(), 0
    for drill in drills:
        begun = time.monotonic()
        died, wrong = perform(drill, workshop, references, args.torchrun)
        if args.die and died != args.die:
            wrong.append("not all deaths came about")
        report(drill, died, wrong, time.monotonic() - begun, workshop)
        deaths.update(f"{'first' if death.rank == 0 else 'other'} rank, {death.what}" for death in died)
        failed += bool(wrong)
    print(f"{sum(deaths.values())} deaths in {len(drills)} jobs, {failed} of which ended otherwise than without: "
          + ", ".join(f"{what} {count}" for what, count in sorted(deaths.items())))
    if failed or args.workshop:
        print(f"what they left is in {workshop.directory}")
    else:
        shutil.rmtree(workshop.directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
