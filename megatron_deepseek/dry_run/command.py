"""--dry-run-memory and --dry-run-communication of the entries. Mistakes are reported before torch is imported."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.arguments.completion import completed
from megatron_deepseek.arguments.dry_run import WORST, DryRun, asked
from megatron_deepseek.data.preprocess.files import refuse_unwritable
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.launch.program import program
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import all_ranks, worst
from megatron_deepseek.settings import Settings

_GPUS_OF_A_NODE = 8


def dry_run(argv: Sequence[str], parser: Callable[[], argparse.ArgumentParser], data: str = "--data-path") -> None:
    """Make the dry run that `argv` asks for and leave; return where it asks for none. `data`: the option of the task's
    data, which need not be given.
    """
    status = exit_status(program(), lambda: _run(argv, parser, data))
    if status is not None:
        raise SystemExit(status)


def _run(argv: Sequence[str], parser: Callable[[], argparse.ArgumentParser], data: str) -> int | None:
    wanted = asked(argv)
    if wanted is None:
        return None
    for option, file in (("--dry-run-json", wanted.json), ("--dry-run-trace", wanted.trace)):
        if file is not None:
            refuse_unwritable(option, file)
    size = str(wanted.world_size)
    node = str(min(wanted.world_size, _GPUS_OF_A_NODE))
    settings = parse_or_exit(completed(_with_base(argv), data), {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": node}, parser)
    preference = settings.fine_tuning.preference if settings.fine_tuning is not None else None
    if preference is not None:
        raise ValueError(f"--objective {preference.objective} has no dry run, which has nothing beside a row's tokens. "
                         "A step of --objective sft, without the options of preferences, has the same weights, "
                         "gradients, moments and layers")
    from megatron_deepseek.dry_run.report import as_json, lines
    from megatron_deepseek.dry_run.trace import trace

    found = []
    for rank in ranks_of(wanted, settings):
        found.append(_dry_rank(wanted, settings, rank))
        print("\n".join(lines(wanted, settings, found[-1])), flush=True)
    distillation = settings.fine_tuning.distillation if settings.fine_tuning is not None else None
    if distillation is not None:
        print(f"not in it: --teacher {distillation.teacher} (docs/distillation.md says what it takes)")
    for file, what in ((wanted.json, as_json), (wanted.trace, trace)):
        if file is not None:
            file.write_text(json.dumps(what(wanted, settings, found)) + "\n")
    return 0


def _with_base(argv: Sequence[str]) -> list[str]:
    """Return `argv` with a name of the weights beside adapters, which a dry run does not read."""
    given = {word.split("=")[0] for word in argv}
    return [*argv, *(("--load", "any") if "--lora-rank" in given and "--load" not in given else ())]


def _dry_rank(wanted: DryRun, settings: Settings, rank: int):
    """Return what a dry run of a rank has found, with a line of progress on a terminal."""
    from megatron_deepseek.dry_run.rank import dry_rank

    return dry_rank(wanted, settings, rank, Progress(rank) if sys.stderr.isatty() else None)


class Progress:
    """A line that says how many of a rank's acts are done."""

    def __init__(self, rank: int):
        self.rank, self.done = rank, 0

    def __call__(self, total: int) -> None:
        """Say that one more of `total` acts is done."""
        self.done += 1
        end = "\n" if self.done == total else ""
        print(f"\rrank {self.rank}: {self.done} of {total} acts", end=end, file=sys.stderr, flush=True)


def ranks_of(wanted: DryRun, settings: Settings) -> Sequence[int]:
    """Return the ranks to look at. Of a pipeline rank's the one whose experts get most stands for all."""
    from megatron_deepseek.dry_run.loads import fullest_rank

    if isinstance(wanted.ranks, tuple):
        return wanted.ranks
    pp_ranks = range(settings.layout.pp)
    if wanted.ranks == WORST:
        pp_ranks = (worst(all_ranks(Job(settings, frozen_base=settings.lora is not None))).pp_rank,)
    return [fullest_rank(settings, pp_rank, wanted.routing) for pp_rank in pp_ranks]
