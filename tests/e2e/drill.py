#!/usr/bin/env python3
"""The fault drill: training jobs that die and are started again, on disks that fill up, from files that are damaged.

    python tests/e2e/drill.py --seeds 20                      drawn from the seeds; layouts and saves take turns
    python tests/e2e/drill.py --kills 1000                    as many jobs as it takes (`make drill`)
    python tests/e2e/drill.py --seeds 5 --layouts pp --torchrun     with torchrun's own restarts, and agents that die

A life of a job ends by SIGKILL somewhere in the middle of something, or it meets a full disk, a directory that it may
not write to any more, or a damaged checkpoint or cache. Each such life goes on or ends in one line; what the tracker
then names is whole; and after a last life in peace all is as if nothing had happened, or the drill says what is
different and ends with status 1: the last checkpoint has the same bits, metrics.jsonl the same lines (but for times),
the export the same bytes. Jobs are forked from here, where everything is imported, so that a life takes seconds.
"""

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / "helpers" / part) for part in ("commands", "ranks"))]

from drill_jobs import LAYOUTS, RANKS, SAVES, AgentDeath, Drill, Story, differences, own_disk, run_forked, run_torchrun  # noqa: E402,E501
from hardships import draw_hardship, mount_disk, unmount_disk  # noqa: E402
from mortal import MOMENTS, Death, draw_death  # noqa: E402
from workshop import Workshop, make_workshop  # noqa: E402


def draw_drill(seed: int, args: argparse.Namespace, can_fill: bool) -> Drill:
    turns = list(itertools.product(args.layouts, args.saves))
    layout, saves = turns[seed % len(turns)]
    endings = sorted(draw_endings(random.Random(seed), args, can_fill), key=is_of_the_end)
    return Drill(f"seed{seed}", layout, saves, args.iterations, tuple(endings))


def is_of_the_end(ending) -> bool:
    """Whether it comes about only once training is done."""
    return isinstance(ending, Death) and ending.what == "export"


def draw_endings(draw: random.Random, args: argparse.Namespace, can_fill: bool) -> Iterator:
    for _ in range(args.deaths):
        if args.torchrun and draw.random() < 0.5:
            yield AgentDeath(draw.randint(200, 12_000))
        else:
            yield draw_death(draw, RANKS)
        if not args.torchrun and draw.random() < args.hardships:
            yield draw_hardship(draw, can_fill)


def planned_drills(args: argparse.Namespace, can_fill: bool) -> Iterator[Drill]:
    """Without an end where a number of kills is asked for."""
    if args.die:
        for layout, saves in itertools.product(args.layouts, args.saves):
            yield Drill(f"planned-{layout}-{saves}", layout, saves, args.iterations, tuple(args.die))
        return
    first = int(time.time()) if args.first_seed is None else args.first_seed
    print(f"--first-seed {first}", flush=True)
    for seed in itertools.count(first) if args.kills else range(first, first + args.seeds):
        yield draw_drill(seed, args, can_fill)


class References:
    """The undisturbed job of each layout, run when it is first asked for."""

    def __init__(self, workshop: Workshop):
        self.workshop = workshop

    def drill(self, layout: str, iterations: int) -> Drill:
        drill = Drill(f"undisturbed-{layout}-{iterations}", layout, "sync", iterations)
        if not drill.files(self.workshop).disk.exists():
            wrong = run_forked(drill, self.workshop).wrong
            if wrong:
                sys.exit(f"the undisturbed job failed: {wrong}\n{drill.log(self.workshop).read_text()}")
        return drill


def perform(drill: Drill, workshop: Workshop, references: References, torchrun: bool) -> Story:
    undisturbed = references.drill(drill.layout, drill.iterations)
    files = drill.files(workshop)
    with own_disk(files):
        story = (run_torchrun if torchrun else run_forked)(drill, workshop)
        story.wrong += [] if story.wrong else differences(files, undisturbed.files(workshop), drill.iterations)
        if story.wrong:  # the disk goes with the job
            shutil.copytree(files.disk, files.disk.with_name(f"{drill.name}-wrong"), dirs_exist_ok=True)
    shutil.rmtree(files.disk, ignore_errors=True)
    return story


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=10, metavar="N", help="jobs to run (10)")
    add("--kills", type=int, default=None, metavar="N", help="run jobs until so many kills came about")
    add("--first-seed", type=int, default=None, metavar="N", help="by the clock, and printed, if not given")
    add("--deaths", type=int, default=4, metavar="N", help="of each job (4)")
    add("--hardships", type=float, default=0.4, metavar="P", help="how probable one is after each death: a full disk, "
        "no permission, damaged files (0.4)")
    add("--die", nargs="+", type=Death.parse, metavar="RANK:WHAT:COUNT", help="a life's end each, instead of drawn "
        f"ones; what: {', '.join(MOMENTS[0])} (milliseconds); it is wrong if one does not come about")
    add("--workshop", type=Path, metavar="DIR", help="a corpus and undisturbed jobs of an earlier drill (a new one)")
    add("--iterations", type=int, default=12, metavar="N", help="of each job (12), a checkpoint after each")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    add("--saves", nargs="+", choices=SAVES, default=list(SAVES))
    add("--torchrun", action="store_true", help="let torchrun restart the ranks, which takes longer; agents die too")
    return parser


def report(drill: Drill, story: Story, seconds: float, workshop: Workshop) -> None:
    print(f"{drill.name} ({drill.layout}, {drill.saves}): {len(story.met)} lives met their fate in {seconds:.0f} s: "
          f"{'; '.join(map(str, story.met))}", flush=True)
    if story.wrong:
        log = drill.log(workshop)
        print("".join(f"  WRONG: {text}\n" for text in story.wrong[:5]) + f"  its output, {log}, ends with\n"
              + "".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-30:]), flush=True)


def kind(ending) -> str:
    if isinstance(ending, Death):
        return f"{'first' if ending.rank == 0 else 'other'} rank killed, {ending.what}"
    return {"AgentDeath": "agent killed", "FullDisk": "full disk", "NoPermission": "no permission",
            "Damage": f"damaged {getattr(ending, 'what', '')}"}[type(ending).__name__]


class Summary:
    """What all jobs together met, and how many ended otherwise than they should."""

    def __init__(self):
        self.met, self.jobs, self.failed = Counter(), 0, 0

    @property
    def kills(self) -> int:
        return sum(count for what, count in self.met.items() if "killed" in what)

    def add(self, story: Story) -> None:
        self.met.update(map(kind, story.met))
        self.jobs, self.failed = self.jobs + 1, self.failed + bool(story.wrong)

    def __str__(self) -> str:
        kinds = ", ".join(f"{what} {count}" for what, count in sorted(self.met.items()))
        return (f"{self.kills} kills and {self.met.total() - self.kills} hardships in {self.jobs} jobs, "
                f"{self.failed} of which ended otherwise than without: {kinds}")


def perform_all(args: argparse.Namespace, workshop: Workshop, can_fill: bool) -> Summary:
    """Until all are done, there were enough kills, or somebody interrupts."""
    references, summary = References(workshop), Summary()
    try:
        for drill in planned_drills(args, can_fill):
            begun = time.monotonic()
            story = perform(drill, workshop, references, args.torchrun)
            if args.die and story.met != args.die:
                story.wrong.append("not all deaths came about")
            report(drill, story, time.monotonic() - begun, workshop)
            summary.add(story)
            if args.kills and summary.kills >= args.kills:
                break
    except KeyboardInterrupt:
        print("interrupted; so far", flush=True)
    return summary


def main() -> int:
    args = build_parser().parse_args()
    workshop = make_workshop((args.workshop or Path(tempfile.mkdtemp(prefix="drill-"))).resolve())
    probe = workshop.directory / "probe"
    can_fill = mount_disk(probe)
    unmount_disk(probe) if can_fill else print("no disk of its own can be mounted here: none is filled", flush=True)
    summary = perform_all(args, workshop, can_fill)
    print(summary)
    if summary.failed or args.workshop:
        print(f"what they left is in {workshop.directory}")
    else:
        shutil.rmtree(workshop.directory)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
