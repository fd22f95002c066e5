"""Regions of tensors, and how one is put together from others: the geometry of resharding, without any file.

A region is a rectangular block of indices. A rank's shard is one, and so is each item that a checkpoint stores. Copying
is fast where numbers that are contiguous in the source are contiguous in the target too, which `segments` finds out.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True, order=True, slots=True)
class Region:
    """The indices place[d] <= index < place[d] + shape[d] of every dimension d of a tensor."""

    place: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(p + n for p, n in zip(self.place, self.shape))

    def overlap(self, other: "Region") -> "Region | None":
        low = tuple(map(max, self.place, other.place))
        high = tuple(map(min, self.end, other.end))
        return Region(low, tuple(b - a for a, b in zip(low, high))) if all(a < b for a, b in zip(low, high)) else None

    def slices(self, inner: "Region") -> tuple[slice, ...]:
        """Return the slices that select `inner` from an array that holds this region."""
        return tuple(slice(a - p, a - p + n) for a, n, p in zip(inner.place, inner.shape, self.place))

    def is_contiguous(self, inner: "Region") -> bool:
        """Return whether the numbers of `inner` are contiguous in the row-major order of this region."""
        first = next((dim for dim, size in enumerate(inner.shape) if size > 1), len(inner.shape))
        return inner.shape[first + 1:] == self.shape[first + 1:]

    def position(self, index: tuple[int, ...]) -> int:
        """Count the numbers of this region that come before the one at `index` in row-major order."""
        position = 0
        for i, p, n in zip(index, self.place, self.shape):
            position = position * n + i - p
        return position

    def cut(self, axis: int, edges: Sequence[int]) -> list["Region"]:
        """Return the regions between increasing `edges` (inside this region) along `axis`."""
        bounds = [self.place[axis], *edges, self.end[axis]]
        return [Region((*self.place[:axis], low, *self.place[axis + 1:]),
                       (*self.shape[:axis], high - low, *self.shape[axis + 1:]))
                for low, high in zip(bounds, bounds[1:])]

    def contiguous_parts(self, largest: int) -> Iterator["Region"]:
        """Yield contiguous parts of at most `largest` numbers in row-major order, cut along leading dimensions."""
        axis = next((dim for dim, size in enumerate(self.shape) if size > 1), None)
        if self.numel <= largest or axis is None:
            yield self
            return
        step = max(1, largest // (self.numel // self.shape[axis]))
        for part in self.cut(axis, range(self.place[axis] + step, self.end[axis], step)):
            yield from part.contiguous_parts(largest)


def fill_once(whole: Region, parts: Iterable[Region]) -> bool:
    """Return whether every index of `whole` is in exactly one of `parts`, and no other index in any.

    How often each index is covered is a sum of steps, up where a part begins and down where it ends. So two coverings
    are the same if their steps are the same at all corners.
    """
    parts = list(parts)
    if parts == [whole]:
        return True
    steps: Counter = Counter()
    for sign, region in [(-1, whole), *((1, part) for part in parts)]:
        if region.numel:
            for corner in product(*((0, 1) for _ in region.shape)):
                at = tuple(p + c * n for p, c, n in zip(region.place, corner, region.shape))
                steps[at] += sign * (-1) ** sum(corner)
    return not any(steps.values())


class HasRegion(Protocol):
    """Something that holds the numbers of a region, in row-major order."""

    @property
    def region(self) -> Region:
        ...


T = TypeVar("T", bound=HasRegion)


@dataclass(frozen=True)
class Segment(Generic[T]):
    """A region that is contiguous in the target, and the `sources` that hold its numbers.

    `is_contiguous` says that there is one source, in which the numbers are contiguous too.
    """

    region: Region
    sources: tuple[T, ...]
    is_contiguous: bool


def segments(target: Region, sources: Sequence[T], largest: int) -> Iterator[Segment[T]]:
    """Yield segments that make up the target in row-major order; the sources cover it and do not overlap.

    A segment that is contiguous in a source has any length. What must be gathered from several places is cut into
    segments of at most `largest` numbers.
    """
    if len(sources) == 1 and sources[0].region.is_contiguous(target):
        yield Segment(target, tuple(sources), True)
        return
    axis = next((dim for dim, size in enumerate(target.shape) if size > 1), None)
    assert axis is not None, "two sources of one number"
    edges = sorted({edge for source in sources for edge in (source.region.place[axis], source.region.end[axis])
                    if target.place[axis] < edge < target.end[axis]})
    if edges:
        parts = target.cut(axis, edges)
        for part, holding in zip(parts, _divide(sources, axis, [part.place[axis] for part in parts])):
            yield from segments(part, holding, largest)
    elif target.numel <= largest:
        yield Segment(target, tuple(sources), False)
    else:
        step = max(1, largest // (target.numel // target.shape[axis]))
        for part in target.cut(axis, range(target.place[axis] + step, target.end[axis], step)):
            yield from segments(part, sources, largest)


def _divide(sources: Sequence[T], axis: int, starts: list[int]) -> list[list[T]]:
    """Return the sources that cover each part; parts begin at `starts` along `axis`, cut at every source's edges."""
    holding: list[list[T]] = [[] for _ in starts]
    for source in sources:
        first = max(bisect_right(starts, source.region.place[axis]) - 1, 0)
        for number in range(first, bisect_left(starts, source.region.end[axis])):
            holding[number].append(source)
    return holding
