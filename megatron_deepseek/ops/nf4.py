"""NF4, the 4-bit numbers of QLoRA (arXiv 2305.14314, section 3): quantise a weight, and make it of the codes again.

    x ~ VALUES[code] * scale        scale: the largest magnitude of 64 neighbours in a row

VALUES are quantiles of a normal distribution, to which trained weights are near: each of the 16 codes is used about as
often. Zero has a code of its own, and the largest magnitude of a block is kept exactly. A value half-way between two
takes the lower one. Two codes share a byte, the first in its upper half. Where the columns are a multiple of 64, codes
and scales are those of bitsandbytes, bit for bit: it too multiplies by the reciprocal of the scale.

With double quantisation the scales are codes as well: of the scales of a row the mean is taken off, and what is left is
E4M3 with one scale. The paper takes the mean of the whole tensor off and has a scale for 256; here every row stands by
itself, so that numbers do not depend on how ranks divide a weight, in rows or in columns. That takes 8 bits and 64 / b
more for each scale: 4.14 bits a weight with 7,168 columns, 4.16 with 2,048; the paper has 4.127.

Shapes: N rows, K columns, b = ceil(K / 64) blocks of a row. A row whose last block is not full is padded with zeros.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.fp8.encoding import E4M3, LARGEST, decode

BLOCK = 64  # numbers with one scale
_SMALLEST = 1e-38  # a block of zeros has a reciprocal as well
# QLoRA, appendix E.
VALUES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


@dataclass(frozen=True, eq=False)
class DoubleScales:
    """Scales [..., N, b] as E4M3 `codes`, with what they are multiplied by and what is added, for each row:
    `of_rows`, float32 [..., N, 2].
    """

    codes: torch.Tensor
    of_rows: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.of_rows.nbytes

    def plain(self) -> torch.Tensor:
        """Return the scales [..., N, b] in float32."""
        return decode(self.codes).mul_(self.of_rows[..., :1]).add_(self.of_rows[..., 1:])


@dataclass(frozen=True, eq=False)
class Nf4:
    """A weight [..., N, K]: `codes` uint8 [..., N, 32 b] with two numbers each, `scales` float32 [..., N, b]."""

    codes: torch.Tensor
    scales: torch.Tensor | DoubleScales
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.columns))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def with_double_scales(self) -> "Nf4":
        """Return the same codes with quantised scales."""
        return Nf4(self.codes, quantize_scales(self.scales), self.columns)

    def plain_scales(self) -> torch.Tensor:
        """Return the scales [..., N, b] in float32."""
        return self.scales.plain() if isinstance(self.scales, DoubleScales) else self.scales

    def rows(self, start: int, stop: int) -> "Nf4":
        """Return rows start..stop of a matrix, sharing its memory."""
        part = slice(start, stop)
        scales = DoubleScales(self.scales.codes[part], self.scales.of_rows[part]) if isinstance(
            self.scales, DoubleScales) else self.scales[part]
        return Nf4(self.codes[part], scales, self.columns)

    def cut(self, columns: slice) -> "Nf4":
        """Return the columns start..stop, which begin where a block does, sharing its memory."""
        blocks = slice(columns.start // BLOCK, num_blocks(columns.stop))
        codes = self.codes[..., blocks.start * BLOCK // 2:blocks.stop * BLOCK // 2]
        scales = DoubleScales(self.scales.codes[..., blocks], self.scales.of_rows) if isinstance(
            self.scales, DoubleScales) else self.scales[..., blocks]
        return Nf4(codes, scales, columns.stop - columns.start)

    def copy_(self, other: "Nf4") -> None:
        """Take over the numbers of another weight of the same shape and kind."""
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(new)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        if isinstance(self.scales, DoubleScales):
            return self.codes, self.scales.codes, self.scales.of_rows
        return self.codes, self.scales


def num_blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def empty(rows: int, columns: int, double: bool, device: torch.device) -> Nf4:
    """Return a matrix whose memory has not been written, with quantised scales if `double`."""
    blocks = num_blocks(columns)
    codes = torch.empty(rows, blocks * BLOCK // 2, dtype=torch.uint8, device=device)
    if not double:
        return Nf4(codes, torch.empty(rows, blocks, device=device), columns)
    scales = DoubleScales(torch.empty(rows, blocks, dtype=E4M3, device=device), torch.empty(rows, 2, device=device))
    return Nf4(codes, scales, columns)


def quantize(x: torch.Tensor) -> Nf4:
    """Quantise x [..., N, K]. Raise ValueError if a value is not finite."""
    columns = x.shape[-1]
    blocks = F.pad(x.float(), (0, -columns % BLOCK)).unflatten(-1, (num_blocks(columns), BLOCK))
    scales = blocks.abs().amax(-1)
    if not scales.isfinite().all():
        raise ValueError("it has values that are not finite, which NF4 cannot hold")
    values = torch.tensor(VALUES, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    normed = blocks * scales.clamp(min=_SMALLEST).reciprocal_().unsqueeze(-1)
    codes = torch.bucketize(normed, middles, out_int32=True).to(torch.uint8).flatten(-2)
    return Nf4(codes[..., 0::2] << 4 | codes[..., 1::2], scales, columns)


def dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight [..., N, K]: products in float32, rounded to `dtype`."""
    values = torch.tensor(VALUES, device=weight.codes.device)
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), 1)  # of each byte; one look-up for two codes
    numbers = pairs.index_select(0, weight.codes.flatten().int()).view(*weight.codes.shape[:-1], -1, BLOCK)
    numbers = numbers.mul_(weight.plain_scales().unsqueeze(-1)).flatten(-2)
    return numbers[..., :weight.columns].to(dtype)


def quantize_scales(scales: torch.Tensor) -> DoubleScales:
    """Quantise scales [..., N, b], those of each row by themselves."""
    mean = scales.double().mean(-1, keepdim=True).float()
    centred = scales - mean
    amax = centred.abs().amax(-1, keepdim=True)
    scale = (amax / LARGEST).where(amax > 0, 1.0)
    return DoubleScales((centred / scale).clamp(-LARGEST, LARGEST).to(E4M3), torch.cat((scale, mean), -1))
