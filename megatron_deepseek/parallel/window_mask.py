"""What is left of a context rank's mask where tokens see a sliding window: rectangles and triangles again.

A token at position q sees the keys k with q - window < k <= q. Positions are cut every `window` tokens. Of its own
piece a token sees what a causal mask shows, a lower triangle. Of the piece before, a key k counts as if it were at
k + window: it is seen where it is later than the token, an upper triangle without its diagonal. Read backwards, rows
and keys from the last to the first, that is a lower triangle too, so that kernels know causal squares alone.

    window 4      k = 0 1 2 3 4 5 6 7
           q = 4          x x x x          the row of 4 sees 1, 2 and 3 of the piece before
           q = 5            x x x x
           q = 6              x x x x
           q = 7                x x x x
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.parallel.block_mask import BlockMask, VisibleBlock

Part = tuple[range, range, bool]  # positions of queries and of keys, and whether they see a lower triangle
Piece = tuple[range, int]  # positions that follow each other, and what is taken off for the place in a rank's block


def lower_triangle(queries: range, keys: range) -> Iterator[Part]:
    """Yield what `queries` see of `keys` under the causal mask: two rectangles and a triangle at most."""
    both = range(max(queries.start, keys.start), min(queries.stop, keys.stop))
    earlier = range(keys.start, min(queries.start, keys.stop))
    later, others = range(keys.stop, queries.stop), range(max(earlier.stop, keys.start), keys.stop)
    parts = (queries, earlier, False), (later, others, False), (both, both, True)
    yield from (part for part in parts if part[0] and part[1])


def upper_triangle(queries: range, keys: range) -> Iterator[Part]:
    """Yield what `queries` see of `keys` where a key is seen if it is later: rectangles, and a triangle read backwards.
    """
    mirrored = lower_triangle(range(-queries.stop, -queries.start), range(1 - keys.stop, 1 - keys.start))
    for rows, columns, causal in mirrored:
        yield range(-rows.stop, -rows.start), range(1 - columns.stop, 1 - columns.start), causal


def band(queries: range, keys: range, window: int) -> Iterator[tuple[Part, bool]]:
    """Yield the parts of `keys` that `queries` see within `window` tokens, and whether each is read backwards."""
    for piece in range(queries.start // window, -(-queries.stop // window)):
        first, last = piece * window, (piece + 1) * window
        rows = range(max(queries.start, first), min(queries.stop, last))
        own = range(max(keys.start, first), min(keys.stop, last))
        shifted = range(max(keys.start + window, first), min(keys.stop + window, last))
        yield from ((part, False) for part in lower_triangle(rows, own) if own)
        for seeing, seen, causal in upper_triangle(rows, shifted) if shifted else ():
            yield (seeing, range(seen.start - window, seen.stop - window), causal), True


@dataclass(frozen=True, eq=False)
class WindowMask:
    """What `blocks` leaves of each rank's block where a token sees `window` tokens at most, itself among them."""

    blocks: BlockMask
    window: int

    def of(self, owner: int) -> tuple[slice, list[VisibleBlock]]:
        """Return the keys of the block of `owner` that are seen at all, and which queries see what of them."""
        _, visible = self.blocks.of(owner)
        parts = [narrow for part in visible for narrow in self._narrowed(part, owner)]
        bounds = [(part.keys.start, part.keys.stop) for part in parts] or [(0, 0)]
        return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds)), parts

    def _narrowed(self, part: VisibleBlock, owner: int) -> Iterator[VisibleBlock]:
        for queries, before in self._pieces(part.rows, self.blocks.rank):
            for keys, before_keys in self._pieces(part.keys, owner):
                for (rows, columns, causal), backwards in band(queries, keys, self.window):
                    yield VisibleBlock(part.batch, slice(rows.start - before, rows.stop - before),
                                       slice(columns.start - before_keys, columns.stop - before_keys), causal,
                                       backwards)

    def _pieces(self, places: slice, rank: int) -> Iterator[Piece]:
        """Yield the positions of the tokens at `places` of the block of `rank`, of each of its two chunks."""
        chunk = self.blocks.length // 2
        for first, last, position in ((0, chunk, rank * chunk),
                                      (chunk, self.blocks.length, (2 * self.blocks.size - 1 - rank) * chunk)):
            start, stop = max(places.start, first), min(places.stop, last)
            if start < stop:
                yield range(start - first + position, stop - first + position), position - first
