"""What rewards gave for some completions, and what became of those for which a function gave nothing."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_deepseek.rewards.spec import RewardSpec

# Kinds of failures.
RAISED, TIMED_OUT, DIED = "raised", "timed out", "died"
NOT_FINITE, WRONG_NUMBER, WRONG_TYPE = "not finite", "wrong number", "wrong type"
KINDS = (RAISED, TIMED_OUT, DIED, NOT_FINITE, WRONG_NUMBER, WRONG_TYPE)


@dataclass(frozen=True)
class Failure:
    """A completion that has no value, and why. `message` is one line."""

    kind: str
    message: str


Value = float | None | Failure


@dataclass(frozen=True)
class RewardResult:
    """The rewards of completions, in their order.

    `values`: by the names of the rewards; None where a function has no opinion or failed. `total`: the sum of the
    values that are there, times their weights; None where none is. `failures`: for each reward that failed, how many
    completions have no value, by kind; `examples`: one message of each kind.
    """

    values: Mapping[str, list[float | None]]
    total: list[float | None]
    failures: Mapping[str, Mapping[str, int]]
    examples: Mapping[str, Mapping[str, str]]

    @property
    def notes(self) -> list[str]:
        """Return a line for each reward and kind of failure, for a log."""
        return [f"reward {name}: {count} {kind}, such as: {self.examples[name][kind]}"
                for name, kinds in self.failures.items() for kind, count in kinds.items()]


def result_of(specs: Sequence[RewardSpec], found: Mapping[str, Sequence[Value]], count: int) -> RewardResult:
    """Return the result for `count` completions, of the values and failures that were found for each of `specs`."""
    values = {spec.name: [None if isinstance(each, Failure) else each for each in found[spec.name]] for spec in specs}
    failed = {name: [each for each in own if isinstance(each, Failure)] for name, own in found.items()}
    failures = {name: dict(Counter(each.kind for each in own)) for name, own in failed.items() if own}
    examples = {name: {each.kind: each.message for each in reversed(own)} for name, own in failed.items() if own}
    return RewardResult(values, totals(specs, values, count), failures, examples)


def totals(specs: Sequence[RewardSpec], values: Mapping[str, Sequence[float | None]], count: int
           ) -> list[float | None]:
    """Return the weighted sums of the values of `count` completions, over the rewards that have one."""
    return [_sum([(spec.weight, values[spec.name][place]) for spec in specs]) for place in range(count)]


def _sum(weighted: Sequence[tuple[float, float | None]]) -> float | None:
    there = [weight * value for weight, value in weighted if value is not None]
    return math.fsum(there) if there else None


def checked(returned: object, count: int) -> list[Value] | Failure:
    """Return what a function gave for `count` completions as numbers, or the failure of the whole call.

    A list, a tuple, and whatever else has `tolist` (arrays and tensors) is taken.
    """
    listed = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(listed, (list, tuple)):
        return Failure(WRONG_TYPE, f"it returned a value of the type {type(returned).__name__}, not a list")
    if len(listed) != count:
        return Failure(WRONG_NUMBER, f"it returned {len(listed)} values for {count} completions")
    return [_checked(each) for each in listed]


def _checked(value: object) -> Value:
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)):
        return Failure(WRONG_TYPE, f"it returned {value!r:.60}, which is no number")
    if not math.isfinite(value):
        return Failure(NOT_FINITE, f"it returned {value}")
    return float(value)
