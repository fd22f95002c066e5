"""The options of a dry run: one step of any rank of any cluster on this machine, without data and without a GPU."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_deepseek.arguments import values

ROUTINGS = ("balanced", "zipf")
DEVICES = ("gpu", "cpu")
WORST, ALL = "worst", "all"
KINDS = ("--dry-run-memory", "--dry-run-communication")
OPTIONS = ("--world-size", "--ranks", "--dry-run-routing", "--dry-run-device", "--dry-run-micro-batches",
           "--dry-run-json", "--dry-run-trace")  # of either


@dataclass(frozen=True)
class DryRun:
    """What is asked of a dry run. `ranks`: WORST, ALL or numbers; `micro_batches`: of a data rank's step, None for as
    many as are needed; `json` and `trace` are files to write, None for none.
    """

    memory: bool
    communication: bool
    world_size: int
    ranks: str | tuple[int, ...] = WORST
    routing: str = ROUTINGS[0]
    device: str = DEVICES[0]
    micro_batches: int | None = None
    json: Path | None = None
    trace: Path | None = None


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of a task."""
    group = parser.add_argument_group("dry run", "of one step, without torchrun, data and GPU (docs/dry_run.md)")
    add = group.add_argument
    add("--dry-run-memory", action="store_true", help="show the bytes that ranks allocate, by kind and over time, and "
        "leave")
    add("--dry-run-communication", action="store_true", help="show every collective of a step with its group, bytes "
        "and place in the schedule, and leave")
    add("--world-size", type=values.positive_int, metavar="RANKS", help="ranks of the job that is not started")
    add("--ranks", type=ranks, default=WORST, metavar="worst|all|0,17",
        help="which of them: the fullest as planned, one of each pipeline rank, or these numbers (worst)")
    add("--dry-run-routing", type=str, choices=ROUTINGS, default=ROUTINGS[0],
        help="how tokens are spread over experts (balanced)")
    add("--dry-run-device", type=str, choices=DEVICES, default=DEVICES[0],
        help="whose kernels and memory: a GPU's, or a CPU's (gpu)")
    add("--dry-run-micro-batches", type=values.positive_int, metavar="N",
        help="of each data rank's step (all with --dry-run-communication, else as many as show the peak)")
    add("--dry-run-json", type=values.path, metavar="FILE", help="also write all numbers there")
    add("--dry-run-trace", type=values.path, metavar="FILE", help="also write the step as a trace for Perfetto")


def ranks(text: str) -> str | tuple[int, ...]:
    """Return WORST, ALL or the numbers of ranks. Raise ArgumentTypeError for anything else."""
    if text in (WORST, ALL):
        return text
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither {WORST} nor {ALL} nor numbers such as 0,17")
    return tuple(dict.fromkeys(map(int, parts)))


def asked(argv: Sequence[str]) -> DryRun | None:
    """Return the dry run that `argv` asks for, None for none. Mistakes in its options are left to the task's parser,
    which says what is wrong, but for what only a dry run needs: raise ValueError for that.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_dry_run(parser)
    try:
        args = parser.parse_known_args(argv)[0]
    except (argparse.ArgumentError, ValueError):
        args = argparse.Namespace(dry_run_memory=True, dry_run_communication=False, world_size=1, ranks=WORST,
                                  dry_run_routing=ROUTINGS[0], dry_run_device=DEVICES[0],
                                  dry_run_micro_batches=None, dry_run_json=None, dry_run_trace=None)
        if not any(word.startswith(KINDS) for word in argv):
            return None
    if not (args.dry_run_memory or args.dry_run_communication):
        alone = [word.split("=")[0] for word in argv if word.split("=")[0] in OPTIONS]
        if alone:
            raise ValueError(f"{alone[0]} is for {' and '.join(KINDS)}; torchrun says how many ranks a run has")
        return None
    which = KINDS[0] if args.dry_run_memory else KINDS[1]
    if args.world_size is None:
        raise ValueError(f"{which} needs --world-size, the number of ranks of the job that it stands for")
    outside = [rank for rank in args.ranks if rank >= args.world_size] if isinstance(args.ranks, tuple) else []
    if outside:
        raise ValueError(f"--ranks {outside[0]} is none of the ranks 0 to {args.world_size - 1} of --world-size "
                         f"{args.world_size}")
    return DryRun(args.dry_run_memory, args.dry_run_communication, args.world_size, args.ranks, args.dry_run_routing,
                  args.dry_run_device, args.dry_run_micro_batches, args.dry_run_json, args.dry_run_trace)
