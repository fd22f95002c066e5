"""The command line of tools/reshard_checkpoint.py.

It must not import torch, so that --help and mistakes in options answer at once. The work is in
reshard_checkpoint_run.py.
"""

import argparse
import os
from collections.abc import Mapping, Sequence

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.parser import build_parser as training_parser
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "reshard_checkpoint.py"
# Arguments of training that decide which rank holds what. Its parser gives them, with their help and their checks.
LAYOUT_OPTIONS = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size",
    "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--pipeline-schedule",
    "--pipeline-model-parallel-layout", "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=PROGRAM, allow_abbrev=False,
                           description="Look into checkpoints of training and rearrange their files, without a GPU or "
                                       "a job, in memory that does not grow with them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_verify, _add_reshard, _add_merge, _add_average, _add_diff):
        add(commands)
    return parser


def _command(commands, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
                                 formatter_class=argparse.MetavarTypeHelpFormatter)
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
    parser = _command(commands, "inspect", "show architecture, layout, step, sizes and a table of the tensors")
    _add_directory(parser, "directory")
    _add_step(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def _add_verify(commands) -> None:
    parser = _command(commands, "verify", "read every byte and compare it with the checksums; exit status 2 "
                                          "where a file is damaged, with the tensors in it")
    _add_directory(parser, "directory")
    _add_step(parser)
    _add_workers(parser)


def _add_reshard(commands) -> None:
    parser = _command(commands, "reshard", "write files of which each rank of a layout reads only its own")
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
    parser.set_defaults(layout_arguments=[option[2:].replace("-", "_") for option in LAYOUT_OPTIONS])
    group.add_argument("--seq-length", type=values.positive_int,
                       help="tokens of a training sequence, which weighs in when layers are "
                            "balanced over stages (the writing job's, or 4096)")


def _add_merge(commands) -> None:
    parser = _command(commands, "merge", "write everything to one file")
    _add_directory(parser, "--load", required=True)
    _add_step(parser)
    _add_output(parser)
    parser.add_argument("--drop-optimizer", action="store_true", help="weights alone")
    parser.add_argument("--max-file-size", type=values.size, metavar="SIZE",
                        help="several files, of at most 5GB, 500MB, ...")
    _add_workers(parser)


def _add_average(commands) -> None:
    parser = _command(commands, "average", "write the mean of the weights of several checkpoints, as an iteration 0 "
                                           "without optimizer state")
    _add_directory(parser, "directories", nargs="+")
    _add_output(parser)
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each checkpoint (all the same)")
    _add_workers(parser)


def _add_diff(commands) -> None:
    parser = _command(commands, "diff", "show the largest differences of each tensor; exit status 1 if there are any")
    _add_directory(parser, "a")
    _add_directory(parser, "b")
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer state out")
    parser.add_argument("--all", action="store_true", help="list the tensors that are the same, too")
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_workers(parser)


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run a command and return its exit status.

    It is 2 for a user's mistake, with one line that says which, and 1 if diff finds a difference.
    """

    def run() -> int:
        args = build_parser().parse_args(argv)
        with quick_imports():
            from megatron_deepseek.cli.checkpoint_options import share_of
            from megatron_deepseek.cli.reshard_checkpoint_run import COMMANDS
        return COMMANDS[args.command](args, share_of(environ, getattr(args, "workers", 1)))

    return exit_status(PROGRAM, run, "interrupted; the same command continues")
