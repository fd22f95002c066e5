"""The parts that a sliding window leaves of a context rank's blocks, against the definition of a window."""

import random

import pytest
import torch

from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.block_mask import BlockMask
from megatron_deepseek.parallel.context import zigzag
from megatron_deepseek.parallel.window_mask import WindowMask, band


def shown(mask: WindowMask, owner: int, rows: int, keys: int) -> torch.Tensor:
    """How often each query of a rank sees each key of the block of `owner`, [2 sequences, rows, keys]."""
    made, parts = mask.of(owner)
    seen = torch.zeros(2, rows, keys, dtype=torch.int)
    for part in parts:
        places = seen[part.batch, part.rows, part.keys]
        square = torch.ones(places.shape[1:], dtype=torch.int)
        assert not part.causal or square.shape[0] == square.shape[1]
        visible = square.tril() if part.causal else square
        places += visible.flip(0, 1) if part.causal and part.backwards else visible
        assert made.start <= part.keys.start and part.keys.stop <= made.stop
    return seen


@pytest.mark.parametrize("seed", range(60))
def test_every_visible_pair_once(seed):
    """Lengths, windows, ranks and documents at random: a pair is in exactly one part, or in none."""
    draw = random.Random(seed)
    size = draw.choice([1, 1, 2, 3])
    length = draw.randint(2, 13) if size == 1 else 2 * size * draw.randint(1, 3)
    window = draw.randint(1, length + 2)
    numbers = torch.tensor([sorted(draw.choices(range(3), k=length)) for _ in range(2)])
    documents = Documents.find(numbers) if draw.random() < 0.5 else None
    for rank in range(size):
        for owner in range(size):
            q, k = zigzag(length, rank, size), zigzag(length, owner, size)
            expected = (k[None] <= q[:, None]) & (k[None] > q[:, None] - window)
            expected = expected.expand(2, -1, -1)
            if documents is not None:
                expected = expected & (numbers[:, q, None] == numbers[:, None, k])
            mask = WindowMask(BlockMask(rank, size, length // size, documents), window)
            assert torch.equal(shown(mask, owner, len(q), len(k)), expected.int()), (size, length, window, rank, owner)


def test_parts_of_a_long_sequence_are_as_large_as_the_window():
    """Of 4 windows: a triangle of each piece, and of each but the first the triangle of the piece before."""
    parts = [*band(range(0, 16), range(0, 16), 4)]
    assert [(len(q), len(k), causal, backwards) for (q, k, causal), backwards in parts] == [
        (4, 4, True, False), *[(4, 4, True, False), (3, 3, True, True)] * 3]
