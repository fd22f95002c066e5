"""Samples of GRPO in a terminal: a line for the step, and for each prompt its answers with what they were worth."""

import textwrap
from collections.abc import Iterator, Sequence

from megatron_deepseek.cli.rollout_records import Kept, Step, mean

_GREEN, _RED, _DIM, _BOLD, _END = "\033[32m", "\033[31m", "\033[2m", "\033[1m", "\033[0m"


def summary_line(step: Step) -> str:
    """Return what a step's samples were in all."""
    found = step.summary()
    ends = ", ".join(f"{count} {reason}" for reason, count in found["finish_reasons"].items())
    means = "".join(f", {name} {number(value)}" for name, value in found["rewards"].items())
    return (f"step {step.number}: {found['samples']} samples of {found['groups']} prompts, {found['even_groups']} of "
            f"these with equal rewards; reward {number(found['reward'])}{means}; {number(found['tokens'], 1)} tokens "
            f"({ends})" + (f"; drift {found['drift']:+.2e}" if found["drift"] is not None else ""))


def shown(groups: Sequence[Sequence[Kept]], width: int, most_lines: int | None, colour: bool) -> Iterator[str]:
    """Yield the lines of prompts and their answers. `most_lines` of each text are shown, None for all."""
    for group in groups:
        average = number(mean([each.reward for each in group]))
        yield _painted(f"── prompt {group[0].group}: {len(group)} samples, mean reward {average} ", _BOLD, colour)
        yield from _wrapped(group[0].prompt, width, most_lines, "  ")
        for place, sample in enumerate(group):
            yield _painted(f"  [{place}] {_worth(sample)}", _colour_of(sample), colour)
            reasoning, answer = sample.parts
            if reasoning is not None:
                yield from (_painted(line, _DIM, colour) for line in _wrapped(reasoning, width, most_lines, "      "))
            yield from _wrapped(answer, width, most_lines, "    > ")
        yield ""


def _worth(sample: Kept) -> str:
    parts = ", ".join(f"{name} {number(value)}" for name, value in sample.rewards.items())
    drift = "" if sample.drift is None else f", drift {sample.drift:+.1e}"
    return (f"advantage {number(sample.advantage, sign='+')}, reward {number(sample.reward)}"
            f"{f' ({parts})' if parts else ''}, {sample.tokens} tokens, {sample.finish_reason}{drift}")


def number(value: float | None, digits: int = 2, sign: str = "") -> str:
    """Return a number for a table, a dash for what is not known."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _colour_of(sample: Kept) -> str:
    return _DIM if not sample.advantage else _GREEN if sample.advantage > 0 else _RED


def _painted(text: str, colour: str, wanted: bool) -> str:
    return f"{colour}{text}{_END}" if wanted else text


def _wrapped(text: str, width: int, most_lines: int | None, indent: str) -> Iterator[str]:
    """Yield a text in lines, its own kept; what models write may hold control characters, which are made visible."""
    lines = [piece for line in _visible(text).split("\n") for piece in
             textwrap.wrap(line, max(width - len(indent), 20), break_on_hyphens=False) or [""]]
    cut = len(lines) if most_lines is None else most_lines
    yield from (indent + line for line in lines[:cut])
    if len(lines) > cut:
        yield f"{indent}... {len(lines) - cut} more lines"


def _visible(text: str) -> str:
    return "".join(each if each == "\n" or each.isprintable() else repr(each)[1:-1] for each in text)
