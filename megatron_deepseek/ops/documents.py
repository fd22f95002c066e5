"""Where the documents of packed rows lie: found once for a batch, on the host, and read by every layer.

Attention is started document by document, so their places decide which kernels run and have to be known to the host.

Shapes: B rows, S tokens of a whole sequence.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


def documents_of(row_S: torch.Tensor) -> dict[int, slice]:
    """Return where each document lies in a row that numbers every token's, in the order of the row.

    Raise ValueError if a document lies in two places.
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
    """The documents of some rows: for each row the places, in order and without gaps."""

    rows: tuple[tuple[slice, ...], ...]

    @classmethod
    def find(cls, numbers_BS: torch.Tensor) -> "Documents":
        """Walk rows that number each token's document; a number stands for one document of its row."""
        return cls(tuple(tuple(documents_of(row_S).values()) for row_S in numbers_BS.cpu()))

    def __getitem__(self, rows: slice) -> "Documents":
        """Return the documents of some of the rows."""
        return Documents(self.rows[rows])

    @property
    def most(self) -> int:
        """The largest number of documents in a row."""
        return max(map(len, self.rows), default=0)

    @cached_property
    def places_BS(self) -> torch.Tensor:
        """Each token's document, counted from 0 within its row: int64 [B, S] on the host."""
        return torch.stack([torch.repeat_interleave(torch.tensor([place.stop - place.start for place in row]))
                            for row in self.rows])
