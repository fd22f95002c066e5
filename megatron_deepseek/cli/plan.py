"""Plan a cluster on a laptop: does it fit, how fast is it, which layout is best; no torch, no GPU, no data.

    tools/plan.py memory --model deepseek-v3 --world-size 2048 --gpu h800 ARGUMENTS OF pretrain_deepseek.py
    tools/plan.py time   --model deepseek-v3 --world-size 2048 --gpu h800 ARGUMENTS OF pretrain_deepseek.py
    tools/plan.py search --model deepseek-v3 --world-size 2048 --gpu h800 --global-batch-size 15360 ARGUMENTS
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from megatron_deepseek.arguments.completion import completed
from megatron_deepseek.cli.plan_options import PROGRAM, check_files, job_of, plan_parser, settings_of, task_of, write
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.planning.changes import changes
from megatron_deepseek.planning.memory import OOM
from megatron_deepseek.planning.page import page
from megatron_deepseek.planning.report import as_json, lines, plan_memory


def memory(argv: Sequence[str]) -> int:
    """Run `plan.py memory`."""
    parser = plan_parser("memory", "What every rank of a run holds at its peak, and whether it fits.")
    args = parser.parse_args(completed(argv))
    check_files(args)
    job, gpu = job_of(args)
    task = task_of(args)
    plan = plan_memory(job, gpu, args.memory_limit, task)
    print("\n".join(lines(plan)))
    if plan.verdict == OOM:
        print("to fit:", *changes(job, gpu, plan.limit, task), sep="\n")
    if args.json is not None:
        write(args.json, json.dumps(as_json(plan)))
    if args.picture is not None:
        from megatron_deepseek.planning.picture import draw_memory

        draw_memory(plan, args.picture)
    return 0


def table(argv: Sequence[str]) -> int:
    """Run `plan.py table`."""
    parser = OneLineParser(prog=f"{PROGRAM} table", description="docs/planning.md: what fits where, for all models.")
    parser.parse_args(argv)
    print(page(settings_of), end="")
    return 0


def time(argv: Sequence[str]) -> int:
    """Run `plan.py time`."""
    from megatron_deepseek.cli.plan_time import plan_time

    return plan_time(argv)


def search(argv: Sequence[str]) -> int:
    """Run `plan.py search`."""
    from megatron_deepseek.cli.plan_search import plan_search

    return plan_search(argv)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "memory": (memory, "memory of every rank of a run, and whether it fits"),
    "time": (time, "seconds of a step, tokens a second, GPU hours; a trace and a picture of the schedule"),
    "search": (search, "the layout that trains fastest on so many GPUs, and its arguments"),
    "table": (table, "docs/planning.md")}


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="\n".join(f"{name:8} {text}" for name, (_, text) in COMMANDS.items())
                           + "\neach command has its own --help")
    parser.add_argument("command", choices=tuple(COMMANDS), help="what to plan")
    first = parser.parse_args(argv[:1])
    return COMMANDS[first.command][0](argv[1:])


def main(argv: Sequence[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
