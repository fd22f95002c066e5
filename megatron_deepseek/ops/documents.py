"""Where the documents of packed rows begin and end: found once for a batch, on the host, and read by every layer.

Attention runs document by document, so the host has to know their places to decide which kernels to launch.

Shapes: B rows, S tokens of a whole sequence.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


def documents_of(row_S: torch.Tensor) -> dict[int, slice]:
    """Return the slice of each document, by its number, in the order of the row; `row_S` has every token's number.

    Raise ValueError if a document is not contiguous.
    """
    numbers, counts = row_S.unique_consecutive(return_counts=True)
    stops = counts.cumsum(0).tolist()
    found = {number: slice(stop - count, stop)
             for number, stop, count in zip(numbers.tolist(), stops, counts.tolist())}
    if len(found) < len(stops):
        raise ValueError(f"a document of a packed row is not in one piece: {numbers.tolist()}")
    return found


@dataclass(frozen=True)
class Documents:
    """The documents of some rows: for each row their slices, in order and without gaps."""

    rows: tuple[tuple[slice, ...], ...]

    @classmethod
    def find(cls, numbers_BS: torch.Tensor) -> "Documents":
        """Return the documents of rows that number each token's document; numbers are compared within a row only."""
        return cls(tuple(tuple(documents_of(row_S).values()) for row_S in numbers_BS.cpu()))

    def __getitem__(self, rows: slice) -> "Documents":
        """Return the documents of some of the rows."""
        return Documents(self.rows[rows])

    @property
    def most(self) -> int:
        """Return the largest number of documents in a row."""
        return max(map(len, self.rows), default=0)

    @cached_property
    def places_BS(self) -> torch.Tensor:
        """Return each token's document, counted from 0 within its row: int64 [B, S] on the host."""
        return torch.stack([torch.repeat_interleave(torch.tensor([place.stop - place.start for place in row]))
                            for row in self.rows])
