"""The tokens of one forward, flattened, and how attention groups them.

Sequences that bring few tokens, as answers do, are computed together: those with equally many, padded to the longest
past. A sequence that brings many, a chunk of a prompt, is computed alone. Rows of the first kind come first.

Shapes: T tokens, R sequences of a group, Q tokens of each, n blocks of each, L = n * block_size places.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby

import torch

from megatron_deepseek.inference.blocks import NULL_BLOCK


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens that one sequence brings: the cache has `first` to `begin` of its places, these are `begin` and on.

    `lag`: how much a token's position is smaller than its place. MTP modules have one, of their depth (speculative.py).
    """

    tokens: list[int]
    blocks: list[int]
    begin: int
    first: int = 0
    lag: int = 0

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)


@dataclass(frozen=True, eq=False)
class Few:
    """R sequences with Q tokens each, in rows `rows`: their blocks, and at most `length` places of each.

    `firsts` and `begins` are those of its pieces. `masks` has the masks that layers asked for so far.
    """

    rows: slice
    tables_Rn: torch.Tensor
    length: int
    firsts: list[int]
    begins: list[int]
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Return R and Q."""
        return len(self.begins), (self.rows.stop - self.rows.start) // len(self.begins)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what is added to scores, [R, Q, L]: 0 where a token sees a place, else -inf; None if all is seen.

        `window`: how many places a token sees at most, its own among them. Layers with the same window get the same
        tensor.
        """
        if window not in self.masks:
            self.masks[window] = self._make_mask(window, dtype)
        return self.masks[window]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        queries = self.shape[1]
        narrow = window is not None and self.length > window
        if queries == 1 and not narrow and not any(self.firsts) and len(set(self.begins)) == 1:
            return None
        device = self.tables_Rn.device
        first_R, begin_R = torch.tensor([self.firsts, self.begins], device=device)
        last_RQ1 = (begin_R.unsqueeze(1) + torch.arange(queries, device=device)).unsqueeze(-1)
        place_L = torch.arange(self.length, device=device)
        hidden_RQL = (place_L > last_RQ1) | (place_L < first_R[:, None, None])
        if narrow:
            hidden_RQL |= place_L <= last_RQ1 - window
        return torch.zeros(hidden_RQL.shape, dtype=dtype, device=device).masked_fill_(hidden_RQL, float("-inf"))


@dataclass(frozen=True, eq=False)
class Many:
    """One sequence whose tokens are in `rows`; `past` are the slots that the cache already has of it."""

    rows: slice
    past: torch.Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of one forward. `slots_T` say where in the cache each is kept; padding goes to the null block.
    `previous_T` are the slots of the places before, of pieces that do not begin at place 0.

    `rows` says at which row the tokens of each piece begin, in the order in which the pieces were given. The first
    `num_few` rows are those of `few`, the first `num_tokens` those of pieces.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    previous_T: torch.Tensor
    rows: list[int]
    few: list[Few]
    many: list[Many]
    num_few: int
    num_tokens: int


def make_batch(pieces: list[Piece], block_size: int, takes_few: Callable[[int, int], bool], device: torch.device,
               padded: Callable[[int], int]) -> Batch:
    """Return the batch of `pieces`.

    `takes_few(queries, keys)` says whether a piece is computed with others. `padded` rounds the number of tokens up.
    """
    assert all(piece.tokens for piece in pieces), "fused attention kernels crash on no queries"
    few = [i for i, piece in enumerate(pieces) if takes_few(len(piece.tokens), piece.end - piece.first)]
    is_few = set(few)
    groups = _groups(pieces, few)
    order = [i for group in groups for i in group] + [i for i in range(len(pieces)) if i not in is_few]
    rows, row = [0] * len(pieces), 0
    for i in order:
        rows[i] = row
        row += len(pieces[i].tokens)
    num_tokens = row
    flat = _flat([pieces[i] for i in order], block_size, padded(num_tokens))
    made = [_few([pieces[i] for i in group], rows[group[0]], block_size, device) for group in groups]
    alone = [_many(pieces[i], rows[i], block_size, device) for i in order if i not in is_few]
    return Batch(*torch.tensor(flat, device=device), rows, made, alone, made[-1].rows.stop if made else 0, num_tokens)


def _groups(pieces: list[Piece], few: list[int]) -> list[list[int]]:
    """Return groups of equally many tokens whose pasts differ by less than a factor of two, or 256 tokens."""
    groups = []
    few = sorted(few, key=lambda i: (len(pieces[i].tokens), pieces[i].end))
    for _, alike in groupby(few, key=lambda i: len(pieces[i].tokens)):
        group: list[int] = []
        for i in alike:
            if group and pieces[i].end > 2 * pieces[group[0]].end + 256:
                groups.append(group)
                group = []
            group.append(i)
        groups.append(group)
    return groups


def _flat(pieces: Iterable[Piece], block_size: int, total: int) -> tuple[list[int], ...]:
    """Return tokens, positions, slots and the slots before them, of all pieces.

    Rows up to `total` repeat the last token, so that they use no other expert than it does; they are of no piece.
    """
    tokens, positions, slots, previous = [], [], [], []
    for piece in pieces:
        tokens += piece.tokens
        positions += range(piece.begin - piece.lag, piece.end - piece.lag)
        slots += slots_of(piece.blocks, piece.begin, piece.end, block_size)
        if piece.begin:
            previous += slots_of(piece.blocks, piece.begin - 1, piece.end - 1, block_size)
        else:
            previous += [NULL_BLOCK] * len(piece.tokens)
    padding = total - len(tokens)
    return (tokens + (tokens[-1:] or [0]) * padding, positions + (positions[-1:] or [0]) * padding,
            slots + [NULL_BLOCK] * padding, previous + (previous[-1:] or [NULL_BLOCK]) * padding)


def slots_of(blocks: list[int], begin: int, end: int, block_size: int) -> list[int]:
    """Return the slots of places `begin` to `end` of a sequence."""
    if end - begin == 1:
        return [blocks[begin // block_size] * block_size + begin % block_size]
    return [blocks[place // block_size] * block_size + place % block_size for place in range(begin, end)]


def _few(pieces: list[Piece], row: int, block_size: int, device: torch.device) -> Few:
    """Return the group of `pieces`, whose rows begin at `row`."""
    longest, queries = max(piece.end for piece in pieces), len(pieces[0].tokens)
    number = -(-longest // block_size)
    tables = [piece.blocks[:number] + [NULL_BLOCK] * (number - len(piece.blocks)) for piece in pieces]
    rows = slice(row, row + queries * len(pieces))
    return Few(rows, torch.tensor(tables, device=device), longest, [piece.first for piece in pieces],
               [piece.begin for piece in pieces])


def _many(piece: Piece, row: int, block_size: int, device: torch.device) -> Many:
    past = slots_of(piece.blocks, piece.first, piece.begin, block_size)
    return Many(slice(row, row + len(piece.tokens)), torch.tensor(past, dtype=torch.int64, device=device))
