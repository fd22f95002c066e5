"""python -m megatron_deepseek.ops: what each operator runs on here, why, and what else there would be."""

import sys

from megatron_deepseek.ops.registry import CANDIDATES, choices


def table() -> list[tuple[str, str, str, str]]:
    """operator, backend, why, other candidates with what keeps them away."""
    rows = [("operator", "backend", "why", "others")]
    for operator, choice in choices().items():
        others = [(candidate.name, candidate.why_not()) for candidate in CANDIDATES[operator]
                  if candidate.name not in (choice.backend, "reference")]
        rows.append((operator, choice.backend, choice.why, ", ".join(
            f"{name} ({'on request' if problem is None else problem})" for name, problem in others)))
    return rows


def main() -> int:
    try:
        rows = table()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + f"  {row[3]}".rstrip())
    print("CPU tensors take the reference whatever is chosen.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
