"""What a context rank's tokens see of the block of every other rank: rectangles and triangles, never a mask tensor.

A rank's block is its two chunks of a sequence (context.py). Of the block of rank o, rank r needs:

    o == r   all queries, all keys, the lower triangle (local order is global order)
    o < r    all queries, the keys of chunk o; chunk 2*cp-1-o is later than all queries
    o > r    the queries of chunk 2*cp-1-r, all keys; chunk r is earlier than all keys

With packed documents, it needs of each of these only what lies within one document: rectangles and triangles again. A
block that shares no document with this rank's queries is passed on unread.

Shapes: B batch, N heads, S queries of this rank, K keys of a block.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_deepseek.ops.documents import Documents


def visible(owner: int, rank: int, length: int) -> tuple[slice, slice, bool]:
    """Return which queries of `rank` see anything of the block of `owner`, which keys they see, and whether what they
    see is a triangle. Blocks have `length` tokens.
    """
    everything = slice(0, length)
    if owner == rank:
        return everything, everything, True
    if owner < rank:
        return everything, slice(0, length // 2), False
    return slice(length // 2, length), everything, False


@dataclass(frozen=True)
class VisibleBlock:
    """A rectangle or, if `causal`, a lower triangle: the queries `rows` of this rank see the `keys` of one block.

    `backwards`: the triangle is one where both are read from the last to the first (window_mask.py).
    """

    batch: slice
    rows: slice
    keys: slice
    causal: bool
    backwards: bool = False

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, N, T, ...] of this part's tokens in the order in which they are read, or back from it."""
        return x.flip(2) if self.backwards and self.causal else x

    def queries(self) -> tuple[slice, slice, slice]:
        """Return the index of the queries in [B, N, S]."""
        return self.batch, slice(None), self.rows

    def keys_among(self, made: slice) -> tuple[slice, slice, slice]:
        """Return the index of the keys in [B, N, K], a tensor that begins at key `made.start` of the block."""
        return self.batch, slice(None), slice(self.keys.start - made.start, self.keys.stop - made.start)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """What the queries of `rank` see of each rank's block, the same for every layer.

    `size`: ranks that share a sequence, with `length` tokens of it on each. `documents`: those of the whole sequences,
    None where attention goes across documents.
    """

    rank: int
    size: int
    length: int
    documents: Documents | None

    def of(self, owner: int) -> tuple[slice, list[VisibleBlock]]:
        """Return the keys of the block of `owner` that are seen at all, and which queries see what of them."""
        return self._blocks[owner]

    @cached_property
    def _blocks(self) -> tuple[tuple[slice, list[VisibleBlock]], ...]:
        return tuple(self._block(owner) for owner in range(self.size))

    def _block(self, owner: int) -> tuple[slice, list[VisibleBlock]]:
        rows, keys, causal = visible(owner, self.rank, self.length)
        if self.documents is None:
            return keys, [VisibleBlock(slice(None), rows, keys, causal)]
        parts = []
        for index, places in enumerate(self.documents.rows):
            for place in places:
                asking, seen = self._within(place, self.rank, rows), self._within(place, owner, keys)
                if asking and seen:
                    parts.append(VisibleBlock(slice(index, index + 1), asking, seen, causal))
        bounds = [(part.keys.start, part.keys.stop) for part in parts] or [(0, 0)]
        return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds)), parts

    def _within(self, place: slice, rank: int, part: slice) -> slice | None:
        """Return where a document of the whole sequence lies in `part` of the block of `rank`, None if it does not.

        The positions of a block's two chunks increase, so a document that lies in both is in one piece here too.
        """
        chunk, bounds = self.length // 2, []
        for begin, count, here in ((rank * chunk, chunk, 0),
                                   ((2 * self.size - 1 - rank) * chunk, self.length - chunk, chunk)):
            start, stop = max(place.start, begin), min(place.stop, begin + count)
            if start < stop:
                bounds += [start - begin + here, stop - begin + here]
        if not bounds:
            return None
        start, stop = max(bounds[0], part.start), min(bounds[-1], part.stop)
        return slice(start, stop) if start < stop else None
