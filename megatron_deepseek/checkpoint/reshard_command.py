"""The command line of tools/reshard_checkpoint.py."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.ending import exit_status
from megatron_deepseek.arguments.command_line import OneLineParser
from megatron_deepseek.arguments.parser import build_parser as training_parser
from megatron_deepseek.checkpoint import inspection
from megatron_deepseek.checkpoint.command_line import produce_visibly, progress, share_of, size
from megatron_deepseek.checkpoint.comparison import Difference, compare
from megatron_deepseek.checkpoint.conversion import DTYPES
from megatron_deepseek.checkpoint.native import WEIGHTS, find_checkpoint, open_checkpoint
from megatron_deepseek.checkpoint.production import Product, Share
from megatron_deepseek.checkpoint.reshard import averaged, files_of_ranks, files_of_size, resharded, wanted
from megatron_deepseek.checkpoint.train_state import TrainState

if TYPE_CHECKING:
    from megatron_deepseek.checkpoint.rank_parts import Reads

PROGRAM = "reshard_checkpoint.py"
# Arguments of training that decide who holds what; they are taken from its parser, with their help and their checks.
LAYOUT_OPTIONS = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size",
    "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--pipeline-schedule",
    "--pipeline-model-parallel-layout", "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage")
_AVERAGE_FILE_BYTES = 1 << 30


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=PROGRAM, allow_abbrev=False,
                           description="Look into checkpoints of training and rearrange their files, without a GPU or "
                                       "a job, in memory that does not grow with them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_verify, _add_reshard, _add_merge, _add_average, _add_diff):
        add(commands)
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
                                 formatter_class=argparse.MetavarTypeHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def _add_directory(parser, option: str, **more) -> None:
    parser.add_argument(option, type=values.path, metavar="DIR",
                        help="a directory of checkpoints, or one iteration's", **more)


def _add_step(parser) -> None:
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="the iteration (the last one)")


def _add_workers(parser) -> None:
    parser.add_argument("--workers", type=values.positive_int, default=1, metavar="N", help="threads (1)")


def _add_output(parser, required: bool = True) -> None:
    parser.add_argument("--save", type=values.path, required=required, metavar="DIR",
                        help="made whole, by a rename at the end")
    parser.add_argument("--dtype", type=str, choices=("bf16", "fp16", "fp32"), help="type of the weights (as stored)")
    parser.add_argument("--no-verify", action="store_true", help="don't compare what is read with its checksums first")


def _add_inspect(commands) -> None:
    parser = _command(commands, "inspect", inspect, "architecture, layout, step, sizes and a table of the tensors")
    _add_directory(parser, "directory")
    _add_step(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def _add_verify(commands) -> None:
    parser = _command(commands, "verify", verify, "read every byte and compare it with the checksums; exit status 2 "
                                                  "where a file is damaged, with the tensors in it")
    _add_directory(parser, "directory")
    _add_step(parser)
    _add_workers(parser)


def _add_reshard(commands) -> None:
    parser = _command(commands, "reshard", reshard, "files from which each rank of a layout reads only its own")
    _add_directory(parser, "--load", required=True)
    _add_step(parser)
    _add_output(parser, required=False)
    parser.add_argument("--drop-optimizer", action="store_true", help="weights alone")
    parser.add_argument("--dry-run", action="store_true", help="tell what ranks would read without resharding, write "
                        "nothing")
    _add_workers(parser)
    group = parser.add_argument_group("the layout that will load it", "as given to pretrain_deepseek.py")
    ranks = group.add_mutually_exclusive_group()
    ranks.add_argument("--world-size", type=values.positive_int, help="ranks of the job (data parallel size x others)")
    ranks.add_argument("--data-parallel-size", type=values.positive_int, help="the same, by what is left for data (1)")
    options = training_parser()._option_string_actions
    for option in LAYOUT_OPTIONS:
        group._add_action(options[option])
    group.add_argument("--seq-length", type=values.positive_int,
                       help="tokens of a training sequence, which weighs in when layers are "
                            "balanced over stages (the writing job's, or 4096)")


def _add_merge(commands) -> None:
    parser = _command(commands, "merge", merge, "one file of all shards")
    _add_directory(parser, "--load", required=True)
    _add_step(parser)
    _add_output(parser)
    parser.add_argument("--drop-optimizer", action="store_true", help="weights alone")
    parser.add_argument("--max-file-size", type=size, metavar="SIZE", help="several files, of at most 5GB, 500MB, ...")
    _add_workers(parser)


def _add_average(commands) -> None:
    parser = _command(commands, "average", average, "the mean of the weights of several checkpoints, as an iteration 0 "
                                                    "without optimizer state")
    _add_directory(parser, "directories", nargs="+")
    _add_output(parser)
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each checkpoint (all the same)")
    _add_workers(parser)


def _add_diff(commands) -> None:
    parser = _command(commands, "diff", diff, "largest differences of each tensor; exit status 1 if there are any")
    _add_directory(parser, "a")
    _add_directory(parser, "b")
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer state out")
    parser.add_argument("--all", action="store_true", help="list the tensors that are the same, too")
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_workers(parser)


def inspect(args: argparse.Namespace, share: Share) -> int:
    found = inspection.describe(open_checkpoint(args.directory, args.ckpt_step))
    print(json.dumps(found, indent=2) if args.json else "\n".join(inspection.lines(found)))
    return 0


def verify(args: argparse.Namespace, share: Share) -> int:
    directory = find_checkpoint(args.directory, args.ckpt_step)
    with progress(inspection.bytes_to_verify(directory)) as bar:
        damage = inspection.verify(directory, args.workers, bar.update)
    for line in damage:
        print(line)
    if damage:
        raise ValueError(f"{directory} is damaged: {len(damage)} file{'s' * (len(damage) > 1)}")
    print(f"{directory}: every file is as it was written")
    return 0


def reshard(args: argparse.Namespace, share: Share) -> int:
    from megatron_deepseek.checkpoint.rank_parts import readers, reads_of_ranks  # which import the model: seconds that
    from megatron_deepseek.checkpoint.target_layout import target_of  # the other commands do without

    checkpoint = open_checkpoint(args.load, args.ckpt_step)
    given = {name: value for name, value in vars(args).items() if f"--{name.replace('_', '-')}" in LAYOUT_OPTIONS}
    target = target_of(args, given, checkpoint)
    tensors = wanted(checkpoint, DTYPES.get(args.dtype), not args.drop_optimizer)
    found = readers(target.division)
    files = files_of_ranks(found, tensors, checkpoint)
    if args.dry_run:
        _print_reads(reads_of_ranks(found, tensors, checkpoint.stored), len(files))
        return 0
    if args.save is None:
        raise ValueError("--save is required, unless --dry-run only looks")
    return _make(resharded(checkpoint, files, args.save, target.note, not args.drop_optimizer,
                           not args.no_verify), share)


def _print_reads(reads: "dict[int, Reads]", new_files: int) -> None:
    """What ranks read of the files as they are; after resharding a rank reads what is its own, and nothing else."""
    opened = [len(each.files) for each in reads.values()]
    print(f"{len(reads)} ranks, {new_files} files after resharding")
    print(f"files that a rank opens now: {max(opened)} at most, {sum(opened) / len(opened):.1f} on average")
    print(f"bytes of a rank's own shards: {max(each.own for each in reads.values()):,} at most; of the stored items "
          f"that hold them, which DCP's own reader reads whole: {max(each.items for each in reads.values()):,}")


def merge(args: argparse.Namespace, share: Share) -> int:
    checkpoint = open_checkpoint(args.load, args.ckpt_step)
    tensors = wanted(checkpoint, DTYPES.get(args.dtype), not args.drop_optimizer)
    files = files_of_size(tensors, checkpoint, args.max_file_size)
    return _make(resharded(checkpoint, files, args.save, None, not args.drop_optimizer,
                           not args.no_verify), share)


def average(args: argparse.Namespace, share: Share) -> int:
    checkpoints = [open_checkpoint(directory) for directory in args.directories]
    weights = args.weights or [1.0] * len(checkpoints)
    if len(weights) != len(checkpoints):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(checkpoints)} checkpoints")
    if not sum(weights) > 0:
        raise ValueError(f"--weights {' '.join(map(str, weights))} add up to {sum(weights):g}, not to more than 0")
    files = files_of_size(wanted(checkpoints[0], DTYPES.get(args.dtype), False), checkpoints[0], _AVERAGE_FILE_BYTES)
    return _make(averaged(checkpoints, weights, files, args.save, TrainState(), not args.no_verify), share)


def _make(product: Product, share: Share) -> int:
    produce_visibly(product, share)
    if share.rank == 0:
        print(f"{product.destination}: {product.nbytes:,} bytes in {len(product.files)} files")
    return 0


def diff(args: argparse.Namespace, share: Share) -> int:
    a, b = open_checkpoint(args.a), open_checkpoint(args.b)
    names = [name for name in a.stored.shapes | b.stored.shapes if name.startswith(WEIGHTS) or not args.weights_only]
    total = sum(item.box.numel * item.dtype.itemsize for name in names if name in b.stored.shapes
                for item in a.stored.items.get(name, ()))
    with progress(total) as bar:
        found = compare(a, b, names, args.workers, bar.update)
    different = [each for each in found if each.reason is not None]
    if args.json:
        print(json.dumps({"a": str(a.directory), "b": str(b.directory), "tensors": [asdict(each) for each in found]},
                         indent=2))
    else:
        _print_differences(found if args.all else different)
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(each.reason for each in different).items())
        print(f"{len(found) - len(different)} of {len(found)} tensors are bit for bit the same" +
              (f"; {len(different)} are not: {reasons}" if different else ""))
    return 1 if different else 0


def _print_differences(rows: list[Difference]) -> None:
    width = max((len(each.name) for each in rows), default=0)
    for each in rows:
        text = {None: "the same", "numbers": "", "dtype": f"{each.detail}; "}.get(each.reason, f"{each.reason} "
                                                                                  f"{each.detail}".strip())
        if each.reason in ("numbers", "dtype"):
            text += (f"{each.different:,} numbers, largest |a - b| {each.largest:.3g}, relative {each.relative:.3g}")
        print(f"{each.name:{width}}  {text}")


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """The exit status: 2 for what a user can mend, with one line that says what; 1 if diff finds a difference."""

    def run() -> int:
        args = build_parser().parse_args(argv)
        return args.run(args, share_of(environ, getattr(args, "workers", 1)))

    return exit_status(PROGRAM, run, "interrupted; the same command continues")
