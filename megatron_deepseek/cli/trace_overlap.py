"""The command line of tools/trace_overlap.py, which prints how much communication computation has hidden.

It reads the traces of --profile; see docs/parallelism.md.
"""

import argparse
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.runtime.trace import Overlap, overlaps, read_trace, total

PROGRAM = "trace_overlap.py"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Print how long each kind of NCCL kernel ran on a CUDA "
                           "device, and how much of that time other kernels ran beside it.")
    parser.add_argument("traces", type=values.path, nargs="+", metavar="TRACE",
                        help="<save>/profile/rank_*.json.gz of pretrain_deepseek.py --profile")
    return parser.parse_args(argv)


def row(found: Overlap, width: int) -> str:
    return (f"{found.kind:{width}} {found.count:7} {found.microseconds / 1e3:10.2f} {found.hidden / 1e3:10.2f} "
            f"{100 * found.share:7.1f} %")


def report(path: Path) -> None:
    found = overlaps(read_trace(path))
    rows = [*found, total(found)]
    width = max(len(each.kind) for each in rows)
    print(f"{path}\n{'':{width}} {'kernels':>7} {'ms':>10} {'hidden ms':>10} {'hidden':>9}")
    print("\n".join(row(each, width) for each in rows))


def run(argv: list[str]) -> int:
    for path in parse_arguments(argv).traces:
        report(path)
    return 0


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv))

