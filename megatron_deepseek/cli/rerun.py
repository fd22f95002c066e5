"""The command line of tools/rerun.py, which prints the command that started a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_deepseek.arguments import values
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.runtime.manifest import FILE, read_starts

PROGRAM = "rerun.py"


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog=PROGRAM, allow_abbrev=False, description="Print the command that started a run, from "
                           "the run.json in its --save, ready for a shell: bash -c \"$(rerun.py DIR)\" runs it again.")
    parser.add_argument("directory", type=values.path, metavar="DIR", help="the --save of a run, or its run.json")
    parser.add_argument("--start", type=values.positive_int, metavar="N", help="the Nth start (the last)")
    parser.add_argument("--list", action="store_true", help="one line for each start instead")
    return parser


def command_line(start: dict[str, Any]) -> str:
    """Return a start's command for a shell, with its directory and its variables."""
    variables = [f"{name}={value}" for name, value in (start.get("environment") or {}).items()]
    words = [*(["env", *variables] if variables else []), *start["command"]]
    directory = start.get("directory")
    return (f"cd {shlex.quote(directory)} && " if isinstance(directory, str) else "") + shlex.join(words)


def summary(number: int, start: dict[str, Any]) -> str:
    """Return a line about a start: when, from which iteration, with what."""
    versions = start.get("versions") or {}
    return (f"{number}: {start.get('time')} from iteration {start.get('iteration')}, {start.get('world_size')} ranks "
            f"on {start.get('device')}, commit {str(start.get('commit'))[:12]}, torch {versions.get('torch')}")


def run(arguments: Sequence[str]) -> int:
    options = build_parser().parse_args(arguments)
    path: Path = options.directory / FILE if options.directory.is_dir() else options.directory
    if not path.is_file():
        raise ValueError(f"{path} is missing: a run writes it into its --save when it starts")
    starts = read_starts(path)
    if options.list:
        print("\n".join(summary(number, start) for number, start in enumerate(starts, 1)))
        return 0
    number = options.start or len(starts)
    if not 1 <= number <= len(starts):
        raise ValueError(f"--start {number}: {path} has {len(starts)} starts")
    print(command_line(starts[number - 1]))
    return 0


def main(arguments: Sequence[str]) -> int:
    return exit_status(PROGRAM, lambda: run(arguments))
