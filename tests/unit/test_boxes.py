"""The geometry of resharding, against arrays that are painted and read."""

import random

import numpy as np
import pytest

from megatron_deepseek.checkpoint.regions import Box, fill_once, segments


class Stored:
    """A box and its numbers in row-major order."""

    def __init__(self, box: Box, whole: np.ndarray):
        self.box, self.numbers = box, whole[Box((0,) * whole.ndim, whole.shape).slices(box)].reshape(-1).copy()


def tiling(box: Box, rng: random.Random, cuts: int) -> list[Box]:
    """A random division into boxes, a grid or not."""
    boxes = [box]
    for _ in range(cuts):
        chosen = rng.choice(boxes)
        axis = rng.randrange(len(box.shape))
        if chosen.shape[axis] > 1:
            boxes.remove(chosen)
            boxes += chosen.cut(axis, [chosen.place[axis] + rng.randrange(1, chosen.shape[axis])])
    return boxes


@pytest.mark.parametrize("shape", [(37,), (12, 10), (5, 7, 6), (1, 9, 4)])
def test_fill_once_is_what_painting_says(shape):
    """Tilings fill; with a box less, twice, moved or grown they do not, wherever that leaves each index once."""
    rng, whole = random.Random(1), Box((0,) * len(shape), shape)
    for _ in range(60):
        boxes = tiling(whole, rng, rng.randrange(10))
        assert fill_once(whole, boxes)
        number, axis = rng.randrange(len(boxes)), rng.randrange(len(shape))
        box, others = boxes[number], boxes[:number] + boxes[number + 1:]
        moved = Box(tuple(p + (d == axis) for d, p in enumerate(box.place)), box.shape)
        grown = Box(box.place, tuple(n + (d == axis) for d, n in enumerate(box.shape)))
        for changed in (others, [*boxes, box], [*others, moved], [*others, grown], [*others, moved, box]):
            painted = np.zeros([n + 2 for n in shape], dtype=int)
            for each in changed:
                painted[tuple(slice(p, p + n) for p, n in zip(each.place, each.shape))] += 1
            expected = np.zeros_like(painted)
            expected[tuple(map(slice, shape))] = 1
            assert fill_once(whole, changed) == np.array_equal(painted, expected), (whole, changed)
    empty = Box(whole.place, (0, *shape[1:]))
    assert fill_once(empty, []) and fill_once(empty, [empty]) and fill_once(whole, [whole, empty])
    assert fill_once(Box((), ()), [Box((), ())]) and not fill_once(Box((), ()), [])


@pytest.mark.parametrize("shape", [(37,), (12, 10), (5, 7, 6), (1, 9, 4), (6, 1, 5)])
def test_segments_are_the_target_in_order(shape):
    """Any target from any tiling: runs are copied as they lie in their source, the rest is gathered."""
    rng, whole = random.Random(0), np.arange(np.prod(shape)).reshape(shape)
    everything = Box((0,) * len(shape), shape)
    for _ in range(60):
        stored = [Stored(box, whole) for box in tiling(everything, rng, rng.randrange(12))]
        for target in tiling(everything, rng, 3):
            sources = [each for each in stored if each.box.overlap(target)]
            got = [number for segment in segments(target, sources, largest=8) for number in numbers(segment, whole)]
            assert got == whole[everything.slices(target)].reshape(-1).tolist(), (target, [s.box for s in sources])


def numbers(segment, whole) -> list[int]:
    if segment.is_run:
        (source,) = segment.sources
        begin = source.box.position(segment.box.place)
        return source.numbers[begin:begin + segment.box.numel].tolist()
    assert segment.box.numel <= 8
    out = np.full(segment.box.shape, -1)
    for source in segment.sources:
        part = segment.box.overlap(source.box)
        if part is not None:
            out[segment.box.slices(part)] = source.numbers.reshape(source.box.shape)[source.box.slices(part)]
    return out.reshape(-1).tolist()


def test_whole_rows_are_one_run():
    """Rows divided otherwise over ranks must not be gathered: that is most of a checkpoint's bytes."""
    whole = np.zeros((12, 5))
    sources = [Stored(Box((0, 0), (8, 5)), whole), Stored(Box((8, 0), (4, 5)), whole)]
    found = list(segments(Box((4, 0), (8, 5)), sources, largest=1))
    assert [(segment.box, segment.is_run) for segment in found] == [
        (Box((4, 0), (4, 5)), True), (Box((8, 0), (4, 5)), True)]


@pytest.mark.parametrize("shape, largest", [((10, 4), 9), ((3, 5, 4), 20), ((3, 5, 4), 8), ((7,), 3), ((), 1)])
def test_pieces_are_runs_in_order(shape, largest):
    whole = Box((0,) * len(shape), shape)
    pieces = list(whole.pieces(largest))
    starts = [whole.position(piece.place) for piece in pieces]
    assert starts == [sum(piece.numel for piece in pieces[:i]) for i in range(len(pieces))]
    assert sum(piece.numel for piece in pieces) == whole.numel
    assert all(piece.numel <= largest and whole.is_run(piece) for piece in pieces)
