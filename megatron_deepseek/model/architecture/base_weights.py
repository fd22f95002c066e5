"""How the frozen weights beside adapters are kept in fewer bits (QLoRA, arXiv 2305.14314), as shapes of bytes.

    --quantization-bit 4   NF4: blocks of 64 numbers of a row (ops/nf4.py)
    --quantization-bit 8   E4M3 in blocks of 128 x 128 with their scales, as released (checkpoint/convert/block_fp8.py)

What is kept so: the matrices of attention, MLPs and experts, which are what released FP8 weights have in FP8.
Embedding, head, norms, routers and eh_proj stay plain.

A weight is two parameters, codes and scales, both of bytes and with the dimensions of the weight; ranks divide them as
they do the weight. A rank's columns are blocks of its own, so none may be cut. Its rows may be any: where blocks of
128 x 128 do not begin where its rows do, each row has the scales of the blocks that it lies in. Data ranks divide the
rows once more, codes and scales each by themselves, since both are whole again where they are multiplied by.

Shapes: E experts, N rows, K columns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import Parameter, parameters

NF4_BITS, FP8_BITS = 4, 8
BITS = (NF4_BITS, FP8_BITS)
BLOCKS = {NF4_BITS: 64, FP8_BITS: 128}  # columns with one scale; in FP8 rows as well
SCALES = "_scales"  # behind the name of a weight, that of its scales
_FLOAT32 = 4
_OF_ROW = 2 * _FLOAT32  # with doubly quantised scales: what they are multiplied by, and what is added
ROUTER = "mlp.gate.weight"  # the end of the name of a router's weight
_PLAIN = (ROUTER, "eh_proj.weight")


@dataclass(frozen=True)
class BaseSettings:
    """Frozen weights in `quantization_bit` 4 or 8; `double_quantization`: the scales of NF4 are quantised as well."""

    quantization_bit: int
    double_quantization: bool = True

    @property
    def block(self) -> int:
        """Return how many numbers of a row have one scale."""
        return BLOCKS[self.quantization_bit]

    @property
    def form(self) -> str:
        """Return what the weights are, in a word or two."""
        if self.quantization_bit == FP8_BITS:
            return "fp8"
        return "nf4, scales quantised" if self.double_quantization else "nf4"


def is_quantised(row: Parameter) -> bool:
    """Return whether a weight is kept in fewer bits: the matrix of a product in attention, an MLP or experts."""
    return row.layer is not None and row.gemms > 0 and not row.name.endswith(_PLAIN)


def quantised_rows(config: ModelConfig) -> Iterator[Parameter]:
    """Yield the rows of the weights that are kept in fewer bits."""
    return (row for row in parameters(config) if is_quantised(row))


@dataclass(frozen=True)
class FrozenShape:
    """Bytes of one weight: `codes` and `scales` of the whole, and what one rank has of them before data ranks do.

    `columns`: numbers of a row on this rank. `rows_of_scale`: 128 where blocks are, else 1.
    """

    codes: tuple[int, ...]
    scales: tuple[int, ...]
    local_codes: tuple[int, ...]
    local_scales: tuple[int, ...]
    columns: int
    rows_of_scale: int

    @property
    def local_bytes(self) -> int:
        """Return what a rank holds before data ranks divide it."""
        return prod(self.local_codes) + prod(self.local_scales)


def frozen_shape(row: Parameter, base: BaseSettings, ranks: Mapping[str, int]) -> FrozenShape:
    """Return the bytes of a weight."""
    local, matrices = row.placement.local_shape(row.shape, ranks), max(1, len(row.stacked))
    *experts, rows, columns = local
    of_scale = _rows_of_scale(row, base, rows, matrices)
    code_bytes, scale_bytes = _bytes_of_row(base, columns)
    scale_rows = matrices * -(-rows // matrices // of_scale)
    local_codes, local_scales = (*experts, rows, code_bytes), (*experts, scale_rows, scale_bytes)
    times = tuple(whole // part for whole, part in zip(row.shape, local, strict=True))
    codes, scales = (tuple(size * number for size, number in zip(part, times)) for part in (local_codes, local_scales))
    return FrozenShape(codes, scales, local_codes, local_scales, columns, of_scale)


def refuse_cut(row: Parameter, base: BaseSettings, ranks: Mapping[str, int]) -> None:
    """Raise ValueError where ranks divide the columns of a weight inside a block."""
    columns = row.placement.local_shape(row.shape, ranks)[-1]
    if columns != row.shape[-1] and columns % base.block:
        raise ValueError(f"--quantization-bit {base.quantization_bit}: {row.name} has {row.shape[-1]} columns, which "
                         f"{row.shape[-1] // columns} tensor-parallel ranks divide inside a block of {base.block}")


def _rows_of_scale(row: Parameter, base: BaseSettings, rows: int, matrices: int) -> int:
    """Return how many rows share scales: a rank's part of each stacked matrix must begin where a block does."""
    if base.quantization_bit == NF4_BITS:
        return 1
    alone = matrices == 1 and rows == row.shape[-2]
    return base.block if alone or rows // matrices % base.block == 0 else 1


def _bytes_of_row(base: BaseSettings, columns: int) -> tuple[int, int]:
    """Return the bytes of the codes and of the scales of so many numbers; NF4 pads the last block."""
    blocks = -(-columns // base.block)
    if base.quantization_bit == FP8_BITS:
        return columns, _FLOAT32 * blocks
    return blocks * base.block // 2, blocks + _OF_ROW if base.double_quantization else _FLOAT32 * blocks
