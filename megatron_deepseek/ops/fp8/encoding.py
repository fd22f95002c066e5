"""Block-scaled FP8 (DeepSeek-V3 report, arXiv 2412.19437, section 3.3): what every backend must give, bit for bit.

    x ~ q * scale        q: float8_e4m3fn (largest 448), scale: one float32 for each tile

    1x128    along the last dimension: activations for the forward, output gradients for dgrad
    128x128  weights, and DeepSeek's released files (checkpoint/convert/block_fp8.py)
    128x1    along the rows, stored transposed: both operands of wgrad, which sums over the rows

The rules, in order, for a tile of any floating dtype:
  1. its values and all arithmetic are float32, division IEEE (no reciprocal), subnormals kept;
  2. scale = amax / 448, at least 2^-126, and where `power_of_two` rounded up to a power of two;
     a tile of zeros has scale 1;
  3. q = x / scale, clamped to +-448, rounded to nearest even with E4M3's subnormals (steps of 2^-9);
  4. a tile with an infinity or a NaN is lost as a whole, so that it can't go unnoticed: scale and all q are NaN (0x7f).
Tiles at the edges are smaller: callers see no padding, and padding never enters an amax. Tensors with a dimension of 0
have results with one.

Shapes: M rows, K columns, k = ceil(K / 128).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.ops.backends.registry import with_backends

TILE = 128
LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32
E4M3 = torch.float8_e4m3fn

Tiles = tuple[torch.Tensor, torch.Tensor]  # codes and scales


def num_tiles(size: int) -> int:
    return -(-size // TILE)


def tile_scales(amax: torch.Tensor, power_of_two: bool = False, largest: float = LARGEST) -> torch.Tensor:
    """Return float32 scales (rules 2 and 4) of tiles whose largest magnitudes are `amax`, float32 of any shape."""
    scale = (amax / largest).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(amax == 0, 1.0, torch.where(amax.isfinite(), scale, torch.nan))


def _encode(tiles: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the codes of `tiles` (rules 3 and 4), overwriting `tiles`; `scale` broadcasts over them."""
    q = tiles.div_(scale).clamp_(-LARGEST, LARGEST).to(E4M3)
    lost = scale.isnan()
    if lost.any():
        q.view(torch.uint8).masked_fill_(lost, 0x7F)
    return q


@with_backends("quantize_1x128")
def quantize_1x128(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x [..., K] into q [..., K] float8_e4m3fn and scales [..., k] float32."""
    size = x.shape[-1]
    tiles = _padded_copy(x, -size % TILE).unflatten(-1, (num_tiles(size), TILE))
    scale = tile_scales(_amax(tiles, (-1,)), power_of_two)
    return _encode(tiles, scale.unsqueeze(-1)).flatten(-2)[..., :size].contiguous(), scale


@with_backends("quantize_128x128")
def quantize_128x128(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x [..., M, K] into q [..., M, K] and scales [..., ceil(M / 128), k]."""
    rows, columns = x.shape[-2:]
    tiles = _padded_copy(x, -columns % TILE, -rows % TILE)
    tiles = tiles.unflatten(-1, (num_tiles(columns), TILE)).unflatten(-3, (num_tiles(rows), TILE))
    scale = tile_scales(_amax(tiles, (-3, -1)), power_of_two)
    q = _encode(tiles, scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2)
    return q[..., :rows, :columns].contiguous(), scale


@with_backends("quantize_both_ways")
def quantize_both_ways(x: torch.Tensor) -> tuple[Tiles, Tiles]:
    """Apply `quantize_128x128` to a weight and to its transpose, which dgrad reads: the same numbers."""
    q, scale = quantize_128x128.reference(x)
    return (q, scale), (q.mT, scale.mT)


@with_backends("quantize_128x1")
def quantize_128x1(x: torch.Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x [M, K] into q [K, M] and scales [K, tiles of rows]: its transpose, in tiles of 128 along M.

    With `counts` (they sum to M) tiles begin anew at each group of rows, so there are sum(ceil(count / 128)) of them; a
    group of no rows has none.
    """
    groups = x.split(list(counts)) if counts is not None else (x,)
    parts = [quantize_1x128.reference(group.t(), power_of_two) for group in groups]
    q, scales = zip(*parts)
    return torch.cat(q, 1), torch.cat(scales, 1)


@with_backends("quantize_rows_and_columns")
def quantize_rows_and_columns(x: torch.Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None
                              ) -> tuple[Tiles, Tiles]:
    """Apply `quantize_1x128` and `quantize_128x1` to x [M, K]: an output gradient, for dgrad and for wgrad."""
    return quantize_1x128.reference(x, power_of_two), quantize_128x1.reference(x, power_of_two, counts)


def dequantize_1x128(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return q [..., K] times its scales [..., k].

    The product is rounded once, to float32, and then converted to `dtype`: on an accelerator as it is stored, so that
    no float32 tensor is made for a narrower one. Such a dtype has room for every code.
    """
    size = q.shape[-1]
    codes = q.to(dtype) if on_accelerator(q) and dtype.itemsize < 4 else decode(q)
    if size % TILE == 0:
        return codes.unflatten(-1, (-1, TILE)).mul_(scale.unsqueeze(-1)).flatten(-2).to(dtype)
    return codes.mul_(scale.repeat_interleave(TILE, -1)[..., :size]).to(dtype)


def dequantize_128x128(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return q [..., M, K] times scales [..., ceil(M / 128), k], rounded as by `dequantize_1x128`."""
    rows, columns = q.shape[-2:]
    spread = scale.repeat_interleave(TILE, -2)[..., :rows, :].repeat_interleave(TILE, -1)[..., :columns]
    return decode(q).mul_(spread).to(dtype)


@with_backends("retile_128x1")
def retile_128x1(q: torch.Tensor, scale: torch.Tensor, power_of_two: bool = False,
                 counts: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert 1x128 tiles, q [M, K] and scales [M, k], by way of float32 to the 128x1 tiles of `quantize_128x1`.

    Where all scales are powers of two the only new error is that of elements much smaller than their new tile's
    largest, which is why the recipe asks for them where values are saved for wgrad.
    """
    return quantize_128x1.reference(dequantize_1x128(q, scale), power_of_two, counts)


def decode(q: torch.Tensor) -> torch.Tensor:
    """Return float32 values of E4M3 codes, on CPU by a table: the conversion was measured to take 15 times as long."""
    if on_accelerator(q):
        return q.float()
    table = torch.arange(256, dtype=torch.uint8, device=q.device).view(E4M3).float()
    return table.index_select(0, q.view(torch.uint8).int().flatten()).view(q.shape)


def _padded_copy(x: torch.Tensor, columns: int, rows: int = 0) -> torch.Tensor:
    """Return a contiguous float32 copy with zeros appended to columns and rows, which change no amax."""
    if columns or rows:
        return F.pad(x.float(), (0, columns, 0, rows) if rows else (0, columns)).contiguous()
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(x)


def _amax(tiles: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return tiles.abs().amax(dims)
