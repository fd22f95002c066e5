"""The reward `code`: whether the program in an answer passes the tests of its row, run in the sandbox.

A row has `test` and `entry_point` as HumanEval, where `test` defines `check(candidate)`, or `tests` or `test_list`: a
list of statements such as "assert f(2) == 4", or one text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_deepseek.rewards.answer import answer_of
from megatron_deepseek.sandbox.run import Limits, isolation, run_all

_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_PYTHON = ("", "python", "py", "python3")


def code_reward(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict], *, seconds: float = 3.0,
                memory_mib: int = 512, workers: int = 2, unisolated: bool = False) -> list[float | None]:
    """Return 1 where a program passes all tests of its row, 0 where not, None for a row without tests.

    The program is the last block of Python in the answer behind the reasoning, or all of the answer. Each may take
    `seconds` of the clock and `memory_mib`; `workers` run at a time. Raise ValueError where the machine cannot isolate
    them, unless `unisolated`.
    """
    found = isolation()
    if not found.namespaces and not unisolated:
        raise ValueError(f"code runs programs that a model wrote, and this machine cannot isolate them ({found.why}); "
                         "code(unisolated=true) runs them with limits alone")
    programs = [program_of(answer_of(prompt, completion), row)
                for prompt, completion, row in zip(prompts, completions, rows)]
    limits = Limits(seconds=seconds, memory_bytes=memory_mib * 2**20)
    outcomes = run_all([each for each in programs if each is not None], limits, workers, unisolated)
    return [None if each is None else float(next(outcomes).passed) for each in programs]


def program_of(answer: str, row: Mapping[str, Any]) -> str | None:
    """Return the program of an answer with the tests of its row, None where that has none."""
    tests = _tests(row)
    return None if tests is None else f"{code_of(answer)}\n\n{tests}\n"


def code_of(answer: str) -> str:
    """Return the last block of Python between fences, or the whole answer if there is no block."""
    blocks = [code for language, code in _FENCED.findall(answer) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else answer


def _tests(row: Mapping[str, Any]) -> str | None:
    if row.get("test") and row.get("entry_point"):
        return f"{row['test']}\n\ncheck({row['entry_point']})"
    tests = row.get("tests") or row.get("test_list")
    if not tests:
        return None
    return tests if isinstance(tests, str) else "\n".join(map(str, tests))
