"""The geometry of resharding, against arrays that are painted and read."""

import random

import numpy as np
import pytest

from megatron_deepseek.parallel.regions import Region, fill_once, segments


class Stored:
    """A region and its numbers in row-major order."""

    def __init__(self, region: Region, whole: np.ndarray):
        self.region = region
        self.numbers = whole[Region((0,) * whole.ndim, whole.shape).slices(region)].reshape(-1).copy()


def tiling(region: Region, rng: random.Random, cuts: int) -> list[Region]:
    """A random division into regions, a grid or not."""
    regions = [region]
    for _ in range(cuts):
        chosen = rng.choice(regions)
        axis = rng.randrange(len(region.shape))
        if chosen.shape[axis] > 1:
            regions.remove(chosen)
            regions += chosen.cut(axis, [chosen.place[axis] + rng.randrange(1, chosen.shape[axis])])
    return regions


@pytest.mark.parametrize("shape", [(37,), (12, 10), (5, 7, 6), (1, 9, 4)])
def test_fill_once_is_what_painting_says(shape):
    """Tilings fill; with a region less, twice, moved or grown they do not, wherever that leaves each index once."""
    rng, whole = random.Random(1), Region((0,) * len(shape), shape)
    for _ in range(60):
        regions = tiling(whole, rng, rng.randrange(10))
        assert fill_once(whole, regions)
        number, axis = rng.randrange(len(regions)), rng.randrange(len(shape))
        region, others = regions[number], regions[:number] + regions[number + 1:]
        moved = Region(tuple(p + (d == axis) for d, p in enumerate(region.place)), region.shape)
        grown = Region(region.place, tuple(n + (d == axis) for d, n in enumerate(region.shape)))
        for changed in (others, [*regions, region], [*others, moved], [*others, grown], [*others, moved, region]):
            painted = np.zeros([n + 2 for n in shape], dtype=int)
            for each in changed:
                painted[tuple(slice(p, p + n) for p, n in zip(each.place, each.shape))] += 1
            expected = np.zeros_like(painted)
            expected[tuple(map(slice, shape))] = 1
            assert fill_once(whole, changed) == np.array_equal(painted, expected), (whole, changed)
    empty = Region(whole.place, (0, *shape[1:]))
    assert fill_once(empty, []) and fill_once(empty, [empty]) and fill_once(whole, [whole, empty])
    assert fill_once(Region((), ()), [Region((), ())]) and not fill_once(Region((), ()), [])


@pytest.mark.parametrize("shape", [(37,), (12, 10), (5, 7, 6), (1, 9, 4), (6, 1, 5)])
def test_segments_are_the_target_in_order(shape):
    """Any target from any tiling: runs are copied as they lie in their source, the rest is gathered."""
    rng, whole = random.Random(0), np.arange(np.prod(shape)).reshape(shape)
    everything = Region((0,) * len(shape), shape)
    for _ in range(60):
        stored = [Stored(region, whole) for region in tiling(everything, rng, rng.randrange(12))]
        for target in tiling(everything, rng, 3):
            sources = [each for each in stored if each.region.overlap(target)]
            got = [number for segment in segments(target, sources, largest=8) for number in numbers(segment, whole)]
            assert got == whole[everything.slices(target)].reshape(-1).tolist(), (target, [s.region for s in sources])


def numbers(segment, whole) -> list[int]:
    if segment.is_contiguous:
        (source,) = segment.sources
        begin = source.region.position(segment.region.place)
        return source.numbers[begin:begin + segment.region.numel].tolist()
    assert segment.region.numel <= 8
    out = np.full(segment.region.shape, -1)
    for source in segment.sources:
        part = segment.region.overlap(source.region)
        if part is not None:
            out[segment.region.slices(part)] = source.numbers.reshape(source.region.shape)[source.region.slices(part)]
    return out.reshape(-1).tolist()


def test_whole_rows_are_one_run():
    """Rows divided otherwise over ranks must not be gathered: that is most of a checkpoint's bytes."""
    whole = np.zeros((12, 5))
    sources = [Stored(Region((0, 0), (8, 5)), whole), Stored(Region((8, 0), (4, 5)), whole)]
    found = list(segments(Region((4, 0), (8, 5)), sources, largest=1))
    assert [(segment.region, segment.is_contiguous) for segment in found] == [
        (Region((4, 0), (4, 5)), True), (Region((8, 0), (4, 5)), True)]


@pytest.mark.parametrize("shape, largest", [((10, 4), 9), ((3, 5, 4), 20), ((3, 5, 4), 8), ((7,), 3), ((), 1)])
def test_pieces_are_runs_in_order(shape, largest):
    whole = Region((0,) * len(shape), shape)
    pieces = list(whole.contiguous_parts(largest))
    starts = [whole.position(piece.place) for piece in pieces]
    assert starts == [sum(piece.numel for piece in pieces[:i]) for i in range(len(pieces))]
    assert sum(piece.numel for piece in pieces) == whole.numel
    assert all(piece.numel <= largest and whole.is_contiguous(piece) for piece in pieces)
