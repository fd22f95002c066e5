"""The numbers that activations are kept in, by precision and by device: bytes of tensors by their shapes.

FP8 is the recipe of ops/fp8/recipe.py: inputs of products as E4M3 codes with a float32 scale for each 128 columns,
attention's output as E5M6, two codes in three bytes.
"""

from dataclasses import dataclass

INDEX = 8  # bytes of an index of torch (int64)
TILE = 128
MAKING = {4: 6, 8: 10}  # of NF4 float32, with codes as int32 or as the layers' dtype; of FP8 with float32 scales too


@dataclass(frozen=True)
class Numbers:
    """`element`: bytes of a number in the layers' dtype. `fp8`: the large products keep their inputs in FP8. `cuda`: as
    CUDA's kernels keep them; on CPU attention pads values to the keys' width and indices have 8 bytes. `making`: what a
    number of a weight that is kept in fewer bits takes at most while it is made plain for a product; 0 for plain ones.
    """

    element: int = 2
    fp8: bool = False
    cuda: bool = True
    making: int = 0

    @property
    def wide(self) -> int:
        """Return the bytes of a number of what is computed in at least float32: statistics, scores, losses."""
        return max(4, self.element)

    @property
    def index(self) -> int:
        """Return the bytes of the place of a token's copy: csrc/ has them as int32."""
        return INDEX // 2 if self.cuda else INDEX

    def plain(self, rows: float, width: int) -> float:
        """Return the bytes of [rows, width] in the layers' dtype."""
        return rows * width * self.element

    def tiles(self, rows: float, width: int) -> float:
        """Return the bytes of [rows, width] as E4M3 in 1x128 tiles."""
        return rows * (width + 4 * -(-width // TILE))

    def product_input(self, rows: float, width: int) -> float:
        """Return the bytes of what a large product keeps of its input."""
        return self.tiles(rows, width) if self.fp8 else self.plain(rows, width)

    def made_plain(self, parameters: float) -> float:
        """Return the bytes of a weight that is made plain for a product, 0 if it is so in any case."""
        return self.element * parameters if self.making else 0.0

    def while_made(self, parameters: float, groups: int = 1) -> float:
        """Return the most bytes beside that weight while it is made: of experts' one after the other, of a matrix more
        than its own.
        """
        each = self.making * parameters / groups
        return each if groups > 1 else max(0.0, each - self.made_plain(parameters))

    def columns(self, rows: float, width: int, groups: int = 1) -> float:
        """Return the bytes of [rows, width] in 128x1 tiles, those of each of `groups` of rows by themselves, which are
        as large; kernels have whole tiles.
        """
        tiles = groups * -(-rows // groups // TILE)
        return width * (tiles * (TILE if self.cuda else 0) + (0 if self.cuda else rows) + 4 * tiles)

    def waiting_gradient(self, rows: float, width: int, groups: int = 1) -> float:
        """Return the bytes of a product's output gradient as it waits for the weight's to be made."""
        return self.columns(rows, width, groups) if self.fp8 else self.plain(rows, width)

    def e5m6(self, rows: float, width: int) -> float:
        """Return the bytes of [rows, width] as packed E5M6 in 1x128 tiles."""
        return rows * (3 * -(-width // 2) + 4 * -(-width // TILE))
