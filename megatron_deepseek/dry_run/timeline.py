"""Bytes over time by category, made of a log of storages: the peak, its moment, and the largest tensors there."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_deepseek.dry_run.labels import CATEGORIES, HOST, category
from megatron_deepseek.dry_run.storages import StorageLog

AFTER = "after the last act"
BEFORE = "before the first act"


@dataclass(frozen=True)
class Level:
    """The fullest moment of an act, or of the time between two: `act` is the one that runs or has ended last.

    `bytes` are on the device, the sum of all categories but the host's.
    """

    act: str
    bytes: int
    categories: Mapping[str, int]


@dataclass(frozen=True)
class Held:
    """A tensor that is there at the peak. `of`: the parameter that it is, or is for; None for others."""

    bytes: int
    category: str
    shape: tuple[int, ...]
    dtype: str
    line: str
    act: str
    of: str | None = None


@dataclass(frozen=True)
class Timeline:
    """`levels` in the order of time; `largest` are the tensors of the peak, the largest first."""

    levels: Sequence[Level]
    peak: Level
    largest: Sequence[Held]


def bytes_over_time(log: StorageLog, shown: int = 10) -> Timeline:
    """Return the timeline of a step that is over."""
    categories = [category(each) for each in log.allocations]
    levels, peak_at = _levels(log, categories)
    peak = max(levels, key=lambda level: level.bytes)
    sizes = dict(zip(log.events[0][:peak_at + 1], log.events[1][:peak_at + 1]))
    there = [(number, size) for number, size in sizes.items() if size and categories[number] != HOST]
    largest = sorted(there, key=lambda item: -item[1])[:shown]
    return Timeline(levels, peak, [_held(log, number, size, categories[number]) for number, size in largest])


def _levels(log: StorageLog, categories: Sequence[str]) -> tuple[list[Level], int]:
    """Return the fullest moment between every two changes of the acts, and which event made the fullest of all."""
    sizes, now = [0] * len(log.allocations), Counter(dict.fromkeys(CATEGORIES, 0))
    total = best = best_at = 0
    levels: list[Level] = []
    for begin, stop, act in _stretches(log):
        top, there = total, dict(now)
        for at in range(begin, stop):
            number, size = log.events[0][at], log.events[1][at]
            change = size - sizes[number]
            sizes[number] = size
            total += change if categories[number] != HOST else 0
            now[categories[number]] += change
            if total > top:
                top, there = total, dict(now)
                if total > best:
                    best, best_at = total, at
        levels.append(Level(act, top, there))
    return levels, best_at


def _stretches(log: StorageLog):
    """Yield (first event, event behind the last, act) between every two changes of the acts."""
    name, begin = BEFORE, 0
    for at, act in log.acts:
        yield begin, at, name
        begin = at
        name = str(act) if act is not None else name if name.startswith("after") else f"after {name}"
    yield begin, len(log.events[0]), AFTER


def _held(log: StorageLog, number: int, size: int, name: str) -> Held:
    allocation = log.allocations[number]
    act = BEFORE if allocation.act.act is None else str(allocation.act.act)
    return Held(size, name, allocation.shape, str(allocation.dtype).removeprefix("torch."), allocation.line, act,
                allocation.of)
