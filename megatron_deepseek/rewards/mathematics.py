"""The reward `math`: whether an answer is the same number, expression or set as the right one, by math-verify.

Its own time-outs use SIGALRM, which works in a main thread only, and otherwise makes every score 0 (verl issue 5635);
here they are off, and the worker in which this runs is killed instead.
"""

import logging
import re
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from megatron_deepseek.rewards.answer import answer_of, right_answer

_MATHEMATICAL = re.compile(r"[\\\d=^_{}<>+*/()-]|^.$")  # else a text, such as the name of a town
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
_PROSE = re.compile(r"(?<![\\\w{])[^\W\d_]{2,}")  # words outside of braces that are no commands


def math_reward(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict], *, answer: str = ""
                ) -> list[float | None]:
    """Return 1 where the answer behind the reasoning equals the row's, 0 where not, None where that cannot be parsed.

    `answer`: the row's column; without it `answer`, `solution`, or the last message if it is the assistant's. What
    stands behind GSM8K's "####" counts.
    """
    right = [right_answer(row, answer) for row in rows]
    return [None if expected is None else _score(expected, answer_of(prompt, completion))
            for prompt, completion, expected in zip(prompts, completions, right)]


def _score(expected: str, answer: str) -> float | None:
    gold = parse_right(expected)
    return float(_library().verify(gold, _parse(answer), timeout_seconds=None)) if gold else None


def parse_right(expected: str) -> list[Any]:
    """Return what math-verify reads in a right answer, an empty list where that is nothing.

    Bare LaTeX is put between dollars: without them 1<x<2 would be read as 1, and 10\\% as 10.
    """
    text = expected.rpartition("####")[2].strip()
    formula = f"${text}$" if _MATHEMATICAL.search(text) and not _PROSE.search(text) else ""
    first, second = (text, formula) if _DELIMITED.search(text) else (formula, text)
    return first and _parse(first) or second and _parse(second) or []


def _parse(text: str) -> list[Any]:
    return _library().parse(text, parsing_timeout=None)


@cache
def _library() -> ModuleType:
    """Return math-verify, which would warn that its time-outs are off."""
    import math_verify
    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    return math_verify
