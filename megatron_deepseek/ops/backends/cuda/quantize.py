"""csrc/'s quantising kernels as the FP8 recipe calls them, with their references' arguments.

An operator returns NotImplemented for what its kernel does not take (other dtypes, widths that are no multiple of 8):
the registry calls the reference then. Codes of groups' 128x1 tiles are padded to whole tiles, where the reference's are
not; only wgrad (gemm.py) reads them.
"""

from collections.abc import Sequence

import torch

from megatron_deepseek.ops.backends import registry
from megatron_deepseek.ops.backends.cuda.operands import aligned, dense, table, tile_rows
from megatron_deepseek.ops.backends.kernels import TILE, operator
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled, plain
from megatron_deepseek.ops.swiglu import swiglu_backward

_BF16 = torch.bfloat16


def _takes(x: torch.Tensor) -> bool:
    return x.dtype in (_BF16, torch.float32) and x.shape[-1] % 8 == 0 and x.numel() > 0


def _rows_in_tiles(counts: Sequence[int]) -> list[tuple[int, int]]:
    return [tile[1:] for tile in tile_rows(counts)]


def _row_tiles(counts: Sequence[int] | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if counts is None else table(_rows_in_tiles, counts, like)


def _columns(x: torch.Tensor, counts: Sequence[int] | None, quantized: tuple[torch.Tensor, torch.Tensor]):
    """Return codes of 128x1 tiles. With `counts` every tile is padded to 128 places with zero codes."""
    q, scale = quantized
    return (q[:, :x.shape[0]] if counts is None else q), scale


def _no_columns(x: torch.Tensor, counts: Sequence[int] | None) -> bool:
    """Return whether groups' 128x1 tiles of x are left to the reference: only csrc's wgrad reads padded ones."""
    return counts is not None and not registry.choices_for(x)["grouped_scaled_mm_wgrad"].backend.startswith("csrc")


def quantize_1x128(x: torch.Tensor, power_of_two: bool = False):
    if not _takes(x):
        return NotImplemented
    q, scale = operator("quantize_rows")(aligned(x.flatten(0, -2)), power_of_two)
    return q.view(x.shape), scale.view(*x.shape[:-1], -1)


def quantize_128x1(x: torch.Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None):
    if not _takes(x) or _no_columns(x, counts):
        return NotImplemented
    return _columns(x, counts, operator("quantize_columns")(dense(x), _row_tiles(counts, x), power_of_two))


def retile_128x1(q: torch.Tensor, scale: torch.Tensor, power_of_two: bool = False,
                 counts: Sequence[int] | None = None):
    if q.shape[-1] % 8 or not q.numel() or _no_columns(q, counts):
        return NotImplemented
    return _columns(q, counts, operator("retile_columns")(
        dense(q), scale.contiguous(), _row_tiles(counts, q), power_of_two))


def quantize_e5m6(x: torch.Tensor):
    if not _takes(x):
        return NotImplemented
    packed, scale = operator("quantize_e5m6")(aligned(x.flatten(0, -2)))
    return packed.view(*x.shape[:-1], -1), scale.view(*x.shape[:-1], -1)


def dequantize_e5m6(packed: torch.Tensor, scale: torch.Tensor, size: int, dtype: torch.dtype = torch.float32):
    if dtype not in (_BF16, torch.float32) or size % 8 or not packed.numel():
        return NotImplemented
    rows = operator("dequantize_e5m6")(dense(packed.flatten(0, -2)), scale.flatten(0, -2).contiguous(),
                                       dtype == torch.float32)
    return rows.view(*packed.shape[:-1], size)


def retile_e5m6(packed: torch.Tensor, scale: torch.Tensor, size: int, power_of_two: bool,
                counts: Sequence[int] | None = None):
    if size % 8 or not packed.numel() or _no_columns(packed, counts):
        return NotImplemented
    return _columns(packed, counts, operator("retile_e5m6")(
        dense(packed), scale.contiguous(), _row_tiles(counts, packed), power_of_two))


def quantize_128x128(x: torch.Tensor, power_of_two: bool = False):
    if not _takes(x) or x.ndim not in (2, 3):
        return NotImplemented
    return operator("quantize_blocks")(dense(x), False, power_of_two)[:2]


def quantize_both_ways(weight: torch.Tensor):
    """Return views of the codes: rows of the transpose's are padded to whole tiles, which the view does not show."""
    if not _takes(weight) or weight.ndim not in (2, 3):
        return NotImplemented
    q, scale, q_t, scale_t = operator("quantize_blocks")(dense(weight), True, False)
    return (q, scale), (q_t[..., :weight.shape[-2]], scale_t)


def quantize_rows_and_columns(x: torch.Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None):
    if not _takes(x) or _no_columns(x, counts):
        return NotImplemented
    q, scale, *columns = operator("quantize_both")(dense(x), _row_tiles(counts, x), power_of_two)
    return (q, scale), _columns(x, counts, columns)


def _gate_and_up(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor] | None:
    """Return both as matrices with equal distances between rows; None if the kernels don't take them."""
    if gate.dtype != _BF16 or gate.shape[-1] % 8 or not gate.numel():
        return None
    rows = [aligned(x.flatten(0, -2)) for x in (gate, up)]
    return rows if rows[0].stride(0) == rows[1].stride(0) else [dense(x) for x in rows]


def quantize_swiglu(gate: torch.Tensor, up: torch.Tensor, power_of_two: bool = False):
    rows = _gate_and_up(gate, up)
    if rows is None:
        return NotImplemented
    q, scale = operator("swiglu_quantize_rows")(*rows, power_of_two)
    return q.view(gate.shape), scale.view(*gate.shape[:-1], -1)


def quantize_swiglu_columns(gate: torch.Tensor, up: torch.Tensor, power_of_two: bool,
                            counts: Sequence[int] | None = None):
    """Take gate and up as numbers, or as the tiles (BlockScaled) that were kept of them for the backward."""
    if _no_columns(gate, counts):
        return NotImplemented
    if (kept := _kept_tiles(gate, up)) is not None:
        tiles = _row_tiles(counts, kept[0])
        return _columns(gate, counts, operator("kept_swiglu_quantize_columns")(*kept, tiles, power_of_two))
    rows = _gate_and_up(gate, up)
    if rows is None:
        return NotImplemented
    return _columns(rows[0], counts, operator("swiglu_quantize_columns")(
        *rows, _row_tiles(counts, gate), power_of_two))


def _kept_tiles(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor] | None:
    """Return codes and scales of gate and of up, [R, I] in bfloat16; None if the kernels don't take them so."""
    if not (isinstance(gate, BlockScaled) and isinstance(up, BlockScaled)):
        return None
    if gate.dtype != _BF16 or gate.ndim != 2 or gate.shape[1] % 8 or not gate.numel():
        return None
    return [dense(part) for tiles in (gate, up) for part in (tiles.q, tiles.scale)]


def swiglu_backward_tiles(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, joint: bool,
                          counts: Sequence[int] | None = None):
    """Return tiles of both gradients, which the kernel makes side by side.

    Those of each are halves of the result where a tile ends between them; else each gradient is quantised by itself.
    """
    if grad.dtype != _BF16 or _no_columns(grad, counts):
        return NotImplemented
    apart = not joint and gate.shape[-1] % TILE
    if (kept := _kept_tiles(gate, up)) is not None and not apart:
        tiles = _row_tiles(counts, kept[0])
        return _both_gradients(operator("kept_swiglu_backward_quantize")(dense(grad), *kept, tiles, False), grad,
                               joint, counts)
    gate, up = plain(gate), plain(up)
    rows = _gate_and_up(gate, up)
    if rows is None:
        return NotImplemented
    if apart:
        return tuple(quantize_rows_and_columns(part, False, counts) for part in swiglu_backward(grad, gate, up))
    return _both_gradients(operator("swiglu_backward_quantize")(
        dense(grad), *rows, _row_tiles(counts, gate), False), grad, joint, counts)


def _both_gradients(tiles: Sequence[torch.Tensor], grad: torch.Tensor, joint: bool, counts: Sequence[int] | None):
    q, scale, *columns = tiles
    columns = _columns(grad, counts, columns)
    if joint:
        return ((q, scale), columns),
    both = zip(*(part.chunk(2, 1) for part in (q, scale)), strict=True), zip(*(part.chunk(2) for part in columns))
    return tuple(zip(*both))


# RMSNorm with quantisation (fp8/norm.py) ------------------------------------------------------------------------------

def norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float, keep: bool):
    if x.dtype != _BF16 or not _takes(x):
        return NotImplemented
    q, scale, rstd, y = operator("norm_quantize_rows")(dense(x.flatten(0, -2)), weight.float(), eps, keep, False)
    rows = x.shape[:-1]
    return q.view(x.shape), scale.view(*rows, -1), rstd.view(*rows, 1), y.view(x.shape) if keep else None


def norm_backward_quantize(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor):
    if x.dtype != _BF16 or grad.dtype != _BF16 or not _takes(x):
        return NotImplemented
    grad, x_RH = (dense(part.flatten(0, -2)) for part in (grad, x))
    q, scale, *columns, grad_weight = operator("norm_backward_quantize")(
        grad, x_RH, weight.float(), rstd.flatten(), None, False)
    tiles = q.view(x.shape), scale.view(*x.shape[:-1], -1)
    return tiles, _columns(x_RH, None, columns), grad_weight.to(weight.dtype)
