"""The command line of tools/view_rollouts.py: what a GRPO run sampled, in the terminal or as a page for a browser."""

import argparse
import shutil
import sys
from collections.abc import Sequence

from megatron_deepseek.arguments import values
from megatron_deepseek.cli import rollout_page, rollout_text
from megatron_deepseek.cli.rollout_records import Kept, Step, find_steps, mean, read_step
from megatron_deepseek.data.preprocess.files import refuse_directory, written_aside
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

PROGRAM = "view_rollouts.py"
ORDERS = {"file": lambda group: 0, "best": lambda group: -(mean([each.reward for each in group]) or 0.0),
          "worst": lambda group: mean([each.reward for each in group]) or 0.0,
          "spread": lambda group: -_spread(group),
          "length": lambda group: -(mean([each.tokens for each in group]) or 0.0)}


def _spread(group: Sequence[Kept]) -> float:
    rewards = [each.reward for each in group if each.reward is not None]
    return max(rewards) - min(rewards) if rewards else 0.0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Look at what a GRPO run sampled, and what it was worth.",
                           epilog="docs/rollouts.md has the fields.")
    add = parser.add_argument
    add("path", type=values.path, metavar="PATH", help="--save of the run, its folder rollouts, or a file step_N.jsonl")
    add("--step", type=values.count, metavar="N", help="(the last)")
    add("--steps", type=values.positive_int, default=1, metavar="N", help="so many, up to that one (1)")
    add("--order", choices=ORDERS, default="file",
        help="prompts by their mean reward, by the spread of their rewards, or by length (file: as they are)")
    add("--contains", metavar="TEXT", help="only prompts of which the text or an answer has this")
    add("--limit", type=values.positive_int, metavar="N", help="prompts of a step (8 in the terminal, all in a page)")
    add("--lines", type=values.positive_int, default=6, metavar="N", help="of a text in the terminal (6)")
    add("--full", action="store_true", help="all lines")
    add("--html", type=values.path, metavar="FILE", help="write a page instead, which needs nothing but a browser")
    args = parser.parse_args(argv)
    if args.html is not None:
        refuse_directory("--html", args.html)
    return args


def chosen_steps(args: argparse.Namespace) -> list[Step]:
    """Return the steps that are asked for. Raise ValueError where a step is not there."""
    files = find_steps(args.path)
    last = max(files) if args.step is None else args.step
    if last not in files:
        raise ValueError(f"--step {last}: {args.path} has {', '.join(map(str, list(files)[:8]))}"
                         f"{' ...' if len(files) > 8 else ''}")
    numbers = [number for number in files if number <= last][-args.steps:]
    return [read_step(number, files[number]) for number in numbers]


def chosen_groups(step: Step, args: argparse.Namespace, limit: int | None) -> list[list[Kept]]:
    """Return the prompts of a step with their samples, as they are to be shown."""
    groups = [group for group in step.groups if args.contains is None or _has(group, args.contains)]
    return sorted(groups, key=ORDERS[args.order])[:limit]


def _has(group: Sequence[Kept], text: str) -> bool:
    return any(text in each.prompt or text in each.completion for each in group)


def run(args: argparse.Namespace) -> int:
    """Show the samples; return the exit status."""
    steps = chosen_steps(args)
    if args.html is not None:
        with written_aside(args.html) as file:
            file.write(rollout_page.page([(each, chosen_groups(each, args, args.limit)) for each in steps]))
        print(f"written to {args.html}")
        return 0
    colour, width = sys.stdout.isatty(), shutil.get_terminal_size((100, 40)).columns
    for step in steps:
        print(rollout_text.summary_line(step))
        groups = chosen_groups(step, args, args.limit or 8)
        for line in rollout_text.shown(groups, width, None if args.full else args.lines, colour):
            print(line)
        if len(groups) < len(step.groups):
            print(f"{len(step.groups) - len(groups)} more prompts; --limit, --order and --contains choose among them")
    return 0


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return exit_status(PROGRAM, lambda: run(parse_arguments(argv)))
