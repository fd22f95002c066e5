"""How the ranks of a layer divide a parameter, as plain data: what DTensor's placements are made to be, without torch.

Data ranks, among which FSDP divides every parameter once more, are not counted here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TP, EP, ETP = "tp", "ep", "etp"  # axes of the meshes (parallel/mesh.py) that divide parameters


@dataclass(frozen=True)
class Division:
    """The ranks of a mesh's `axis` divide dimension `dim`: each of the `matrices` that are stacked along it.

    `pieces`: into how many the dimension can be cut, None for any number. Where the ranks are a multiple of them, they
    do not divide it: each has all of it.
    """

    axis: str
    dim: int
    matrices: int = 1
    pieces: int | None = None

    def parts(self, ranks: int) -> int:
        """Return into how many parts so many ranks divide the dimension: as many as they are, or 1."""
        return 1 if self.pieces and ranks > self.pieces and ranks % self.pieces == 0 else ranks


@dataclass(frozen=True)
class Placement:
    """A way to divide parameters, with the name by which people speak of it."""

    name: str
    divisions: tuple[Division, ...] = ()

    @property
    def mesh(self) -> str:
        """Return which mesh of ranks holds such a parameter: "dense" or "expert"."""
        return "expert" if any(division.axis == EP for division in self.divisions) else "dense"

    def local_shape(self, shape: Sequence[int], ranks: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape that one rank holds of `shape`, given how many ranks each axis has.

        Raise ValueError where they do not divide a dimension evenly.
        """
        local = list(shape)
        for division in self.divisions:
            size = division.parts(ranks[division.axis])
            if local[division.dim] % (division.matrices * size):
                raise ValueError(f"dimension {division.dim} of a weight of shape {tuple(shape)} is not a multiple of "
                                 f"the {size} ranks of {division.axis}")
            if division.pieces and division.pieces % size:
                raise ValueError(f"the {division.pieces} heads of keys and values are neither a multiple of the {size} "
                                 f"ranks of {division.axis} nor a divisor of it")
            local[division.dim] //= size
        return tuple(local)

    def parts(self, ranks: Mapping[str, int]) -> int:
        """Return into how many equal parts the ranks divide a parameter."""
        parts = 1
        for division in self.divisions:
            parts *= division.parts(ranks[division.axis])
        return parts


REPLICATED = Placement("replicated")
ROWS = Placement("rows", (Division(TP, 0),))  # column-parallel: output features
COLUMNS = Placement("columns", (Division(TP, 1),))  # row-parallel: input features
VOCABULARY_ROWS = Placement("vocabulary rows", (Division(TP, 0),))
EXPERT_ROWS = Placement("experts, and rows of gate and up", (Division(EP, 0), Division(ETP, 1, matrices=2)))
EXPERT_COLUMNS = Placement("experts, and columns", (Division(EP, 0), Division(ETP, 2)))


def key_value_rows(heads: int) -> Placement:
    """Return the placement of a projection to `heads` heads of keys or values: whole heads, or all where they are few.
    """
    return Placement("rows of keys and values", (Division(TP, 0, pieces=heads),))
