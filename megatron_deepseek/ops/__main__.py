"""python -m megatron_deepseek.ops: which backend each operator runs on here, why, and which others there are."""

import sys

from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.ops.backends.registry import CANDIDATES, choices

PROGRAM = "python -m megatron_deepseek.ops"


def table() -> list[tuple[str, str, str, str]]:
    """Return rows of operator, backend, the reason for it, and the other candidates with what rules them out."""
    rows = [("operator", "backend", "why", "others")]
    for operator, choice in choices().items():
        others = [(candidate.name, candidate.why_not()) for candidate in CANDIDATES[operator]
                  if candidate.name not in (choice.backend, "reference")]
        rows.append((operator, choice.backend, choice.why, ", ".join(
            f"{name} ({'on request' if problem is None else problem})" for name, problem in others)))
    return rows


def run(argv: list[str]) -> int:
    OneLineParser(prog=PROGRAM, description="Print what each operator runs on here, and why.").parse_args(argv)
    rows = table()
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + f"  {row[3]}".rstrip())
    print("CPU tensors take the reference whatever is chosen.")
    return 0


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
