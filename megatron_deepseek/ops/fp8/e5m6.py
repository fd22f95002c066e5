"""E5M6, the 12-bit format in which the recipe caches the input of the linear after attention.

A code has 1 sign, 5 exponent (bias 15) and 6 mantissa bits, with subnormals, infinity and NaN: it is IEEE half
precision without its last four mantissa bits, so that a code shifted left by 4 is a float16. The largest finite value
is 65024, the smallest subnormal 2^-20. Scales are powers of two, one for each 1x128 tile, by the rules of encoding.py
with 65024 for 448. A tile with an infinity or a NaN is lost as a whole: its scale is NaN, and all its codes are 0x7e0,
a NaN.

Codes are packed, two in three bytes, little-endian: byte 0 has the low 8 bits of the first code, byte 1 its high 4 bits
and above them the low 4 of the second, byte 2 the second's high 8. An odd last code is followed by a zero.

The recipe does not use E4M3 here because attention's backward reads this tensor again, and is sensitive to its
precision.

Shapes: K columns, k = ceil(K / 128), p = 3 * ceil(K / 2) bytes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.backends.registry import with_backends
from megatron_deepseek.ops.fp8.encoding import TILE, num_tiles, quantize_128x1, tile_scales

LARGEST = 65024.0
_SMALLEST_NORMAL = 2.0**-14
_STEP_OF_SUBNORMALS = 2.0**-20
_NAN = 0x7E0


@with_backends("quantize_e5m6")
def quantize_e5m6(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x [..., K] into packed codes [..., p] uint8 and scales [..., k] float32."""
    size = x.shape[-1]
    tiles = F.pad(x.float(), (0, -size % TILE)).unflatten(-1, (num_tiles(size), TILE))
    scale = tile_scales(tiles.abs().amax(-1), power_of_two=True, largest=LARGEST)
    codes = encode((tiles / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST))
    codes = torch.where(scale.isnan().unsqueeze(-1), _NAN, codes).flatten(-2)[..., :size]
    return pack(codes), scale


@with_backends("dequantize_e5m6")
def dequantize_e5m6(packed: torch.Tensor, scale: torch.Tensor, size: int, dtype: torch.dtype = torch.float32
                    ) -> torch.Tensor:
    """Return the first `size` values [..., size] of what `quantize_e5m6` made; they are exact in float32."""
    spread = scale.repeat_interleave(TILE, -1)[..., :size]
    return (decode(unpack(packed)[..., :size]) * spread).to(dtype)


@with_backends("retile_e5m6")
def retile_e5m6(packed: torch.Tensor, scale: torch.Tensor, size: int, power_of_two: bool,
                counts: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert rows of E5M6, [M, p] with scales [M, k], to E4M3 in 128x1 tiles: what `quantize_128x1` makes of the rows.
    """
    return quantize_128x1.reference(dequantize_e5m6.reference(packed, scale, size), power_of_two, counts)


def encode(x: torch.Tensor) -> torch.Tensor:
    """Return int32 codes of float32 values within +-65024, rounded to nearest even."""
    subnormal = (x / _STEP_OF_SUBNORMALS).round() * _STEP_OF_SUBNORMALS
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF
    exact = torch.where(x.abs() < _SMALLEST_NORMAL, subnormal, rounded.view(torch.float32))
    return (exact.to(torch.float16).view(torch.int16).to(torch.int32) >> 4) & 0xFFF


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of int32 codes."""
    return (codes << 4).to(torch.int16).view(torch.float16).float()


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack int32 codes [..., K] into uint8 [..., p]."""
    first, second = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4], -1).flatten(-2).to(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [..., p] into int32 codes [..., 2 p / 3]."""
    low, middle, high = packed.to(torch.int32).unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([low | (middle & 0xF) << 8, middle >> 4 | high << 4], -1).flatten(-2)
