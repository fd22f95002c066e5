"""NF4, the 4-bit numbers of QLoRA (arXiv 2305.14314, section 3): quantise a weight, and make it of the codes again.

    x ~ VALUES[code] * scale        scale: the largest magnitude of 64 neighbours in a row

VALUES are quantiles of a normal distribution, to which trained weights are near: each of the 16 codes is used about as
often. Zero has a code of its own, and the largest magnitude of a block is kept exactly. A value half-way between two
takes the lower one. Two codes share a byte, the first in its upper half, as bitsandbytes packs them.

With double quantisation the scales are codes as well: of 256 neighbouring scales the mean is taken off, and what is
left is E4M3 with one scale: 0.129 instead of 0.5 bits a weight. The paper takes the mean of the whole tensor off; here
it is each block's own, so that numbers do not depend on how ranks divide a weight.

Shapes: N rows, K columns, b = ceil(K / 64) blocks of a row. A row whose last block is not full is padded with zeros.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.fp8.encoding import E4M3, LARGEST

BLOCK = 64  # numbers with one scale
SCALE_BLOCK = 256  # scales with one second-level scale
# QLoRA, appendix E.
VALUES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


@dataclass(frozen=True, eq=False)
class DoubleScales:
    """Scales [..., N, b] as E4M3 codes [S, 256], with a scale and a mean of each row of codes, float32 [S]."""

    codes: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.mean.nbytes

    def plain(self) -> torch.Tensor:
        """Return the scales [..., N, b] in float32."""
        wide = self.codes.float().mul_(self.scale.unsqueeze(1)).add_(self.mean.unsqueeze(1))
        return wide.flatten()[:self.shape.numel()].view(self.shape)


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

    def with_plain_scales(self) -> "Nf4":
        """Return the same weight with scales that can be cut."""
        return Nf4(self.codes, self.scales.plain(), self.columns) if isinstance(self.scales, DoubleScales) else self


def num_blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def quantize(x: torch.Tensor) -> Nf4:
    """Quantise x [..., N, K]. Raise ValueError if a value is not finite."""
    columns = x.shape[-1]
    blocks = F.pad(x.float(), (0, -columns % BLOCK)).unflatten(-1, (num_blocks(columns), BLOCK))
    scales = blocks.abs().amax(-1)
    if not scales.isfinite().all():
        raise ValueError("it has values that are not finite, which NF4 cannot hold")
    values = torch.tensor(VALUES, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    normed = blocks / scales.where(scales > 0, 1.0).unsqueeze(-1)
    codes = torch.bucketize(normed, middles, out_int32=True).to(torch.uint8).flatten(-2)
    return Nf4(codes[..., 0::2] << 4 | codes[..., 1::2], scales, columns)


def dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight [..., N, K]: products in float32, rounded to `dtype`."""
    values = torch.tensor(VALUES, device=weight.codes.device)
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), 1)  # of each byte; one look-up for two codes
    numbers = pairs.index_select(0, weight.codes.flatten().int()).view(*weight.codes.shape[:-1], -1, BLOCK)
    numbers = numbers.mul_(weight.with_plain_scales().scales.unsqueeze(-1)).flatten(-2)
    return numbers[..., :weight.columns].to(dtype)


def quantize_scales(scales: torch.Tensor) -> DoubleScales:
    """Quantise scales [..., N, b] in blocks of 256 in the order of memory."""
    size = scales.numel()
    rows = F.pad(scales.flatten(), (0, -size % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    counts = torch.full((len(rows), 1), SCALE_BLOCK, device=rows.device)
    counts[-1:] = size - SCALE_BLOCK * (len(rows) - 1)
    mean = rows.sum(1, keepdim=True) / counts
    centred = rows - mean
    inside = torch.arange(SCALE_BLOCK, device=rows.device) < counts
    amax = centred.masked_fill(~inside, 0.0).abs().amax(1, keepdim=True)
    scale = (amax / LARGEST).where(amax > 0, 1.0)
    codes = (centred / scale).masked_fill(~inside, 0.0).clamp(-LARGEST, LARGEST).to(E4M3)
    return DoubleScales(codes, scale.squeeze(1), mean.squeeze(1), scales.shape)
