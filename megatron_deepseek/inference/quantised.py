"""Weights that are not plain numbers: released FP8, NF4, and a base with a LoRA adapter beside it.

A layer of the training model calls `gemm(x, weight)`, whatever the weight is. So nothing in it changes here: the weight
is taken out of the module, a `HeldWeight` put in its place, and its GEMM becomes `HeldGemm`, which asks the weight for
its product. Whoever needs the numbers themselves, as absorbed attention does, asks `dense_weight`.

Shapes: R rows, N outputs, K inputs, E experts of this rank, k = ceil(K / 128).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from megatron_deepseek.ops import nf4
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.fp8.gemm import grouped_scaled_mm, scaled_mm
from megatron_deepseek.ops.grouped_gemm import grouped_gemm
from megatron_deepseek.ops.lora import LowRank
from megatron_deepseek.ops.precision_recipe import Deferred, Functions, GateUp, Gemm, Grouped
from megatron_deepseek.ops.products import linear
from megatron_deepseek.ops.swiglu import swiglu
from megatron_deepseek.parallel.tensor import ParallelLinear

_NUMBERS_AT_ONCE = 1 << 24  # of an NF4 weight, made plain for a product


class HeldWeight(ABC):
    """A weight [N, K], or of experts [E, N, K], that makes its own products."""

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K] times the transposed weight, [..., N], in x's dtype."""

    def multiply_grouped(self, rows_RK: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return each expert's `counts[e]` rows times its transposed weight, [R, N]."""
        raise NotImplementedError(f"{type(self).__name__} holds no experts")

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that the weight stands for."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Return the shape of the numbers on this rank."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return how many bytes of memory the weight takes."""


@dataclass(frozen=True)
class HeldGemm(Gemm):
    """The GEMM of whatever weight it is given: inference has no gradients. `swiglu` is as in `Linear`."""

    swiglu: Callable[..., torch.Tensor] = swiglu

    def __call__(self, x, weight, *counts):
        return weight.multiply_grouped(x, *counts) if counts else weight.multiply(x)

    def after_swiglu(self, gate_up: GateUp, weight, *counts):
        return self(self.swiglu(*gate_up), weight, *counts)

    def compiled(self, functions: Functions) -> "HeldGemm":
        return replace(self, swiglu=functions(self.swiglu))

    def deferring(self, deferred: Deferred) -> Gemm:
        raise NotImplementedError("held weights are not trained")


@dataclass(frozen=True, eq=False)
class PlainWeight(HeldWeight):
    """An ordinary tensor, for an adapter to stand beside."""

    weight: torch.Tensor

    def multiply(self, x):
        return linear(x, self.weight)

    def multiply_grouped(self, rows_RK, counts):
        return grouped_gemm(rows_RK, self.weight, counts)

    def dense(self, dtype):
        return self.weight.to(dtype)

    @property
    def shape(self):
        return self.weight.shape

    @property
    def nbytes(self):
        return self.weight.nbytes


@dataclass(frozen=True, eq=False)
class Fp8Weight(HeldWeight):
    """E4M3 codes [..., N, K] with the scales of blocks, [..., ceil(N / 128), k], or where ranks cut blocks, of rows'
    tiles, [..., N, k].

    As in DeepSeek's own inference x is quantised in tiles of 1x128 and both are multiplied as FP8 (ops/fp8/gemm.py).
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def multiply(self, x):
        rows = x.flatten(0, -2)
        return scaled_mm(*encoding.quantize_1x128(rows), self.codes, self.scales, x.dtype).view(*x.shape[:-1], -1)

    def multiply_grouped(self, rows_RK, counts):
        return grouped_scaled_mm(*encoding.quantize_1x128(rows_RK), self.codes, self.scales, counts, rows_RK.dtype)

    def dense(self, dtype):
        if self.scales.shape[-2] == self.codes.shape[-2]:
            return encoding.dequantize_1x128(self.codes, self.scales, dtype)
        return encoding.dequantize_128x128(self.codes, self.scales, dtype)

    @property
    def shape(self):
        return self.codes.shape

    @property
    def nbytes(self):
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True, eq=False)
class Nf4Weight(HeldWeight):
    """Numbers of 4 bits, which become plain ones of x's dtype for each product, some rows at a time.

    `experts`: one for each expert of this rank; of an ordinary weight there is one.
    """

    experts: tuple[nf4.Nf4, ...]
    stacked: bool

    def multiply(self, x):
        return _multiply_nf4(x, self.experts[0])

    def multiply_grouped(self, rows_RK, counts):
        parts = [_multiply_nf4(rows, weight) for rows, weight in zip(rows_RK.split(counts), self.experts, strict=True)
                 if len(rows)]
        return torch.cat(parts) if parts else rows_RK.new_empty(0, self.experts[0].shape[0])

    def dense(self, dtype):
        found = [nf4.dequantize(weight, dtype) for weight in self.experts]
        return torch.stack(found) if self.stacked else found[0]

    @property
    def shape(self):
        return torch.Size(((len(self.experts),) if self.stacked else ()) + tuple(self.experts[0].shape))

    @property
    def nbytes(self):
        return sum(weight.nbytes for weight in self.experts)


def _multiply_nf4(x: torch.Tensor, weight: nf4.Nf4) -> torch.Tensor:
    """Return x [..., K] times the transposed weight, whose rows are made plain by parts."""
    rows = max(1, _NUMBERS_AT_ONCE // weight.columns)
    parts = [linear(x, nf4.dequantize(weight.rows(start, start + rows), x.dtype))
             for start in range(0, weight.shape[0], rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@dataclass(frozen=True, eq=False)
class AdaptedWeight(HeldWeight):
    """W + scale * B A (LoRA, arXiv 2106.09685), with W held in whatever form: A [r, K], B [N, r]."""

    base: HeldWeight
    a_rK: torch.Tensor
    b_Nr: torch.Tensor
    scale: float

    def multiply(self, x):
        return self.base.multiply(x) + linear(linear(x, self.a_rK.to(x.dtype)), self.b_Nr.to(x.dtype)) * self.scale

    def dense(self, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        return (self.base.dense(wide) + self.b_Nr.to(wide) @ self.a_rK.to(wide) * self.scale).to(dtype)

    @property
    def shape(self):
        return self.base.shape

    @property
    def nbytes(self):
        return self.base.nbytes + self.a_rK.nbytes + self.b_Nr.nbytes


@dataclass(frozen=True, eq=False)
class AdaptedExperts(HeldWeight):
    """Experts with an adapter beside each, in whatever form they are held: A [E, m r, K], B [E, N, r] with the scale in
    it, of m = `matrices` projections in a stack, as gate and up.
    """

    base: HeldWeight
    a_ErK: torch.Tensor
    b_ENr: torch.Tensor
    matrices: int

    def multiply(self, x):
        raise NotImplementedError("experts are multiplied by the rows of each")

    def multiply_grouped(self, rows_RK, counts):
        low_rank = LowRank(lambda: self.a_ErK, lambda: self.b_ENr, 1.0, Grouped(), Grouped(), self.matrices)
        return self.base.multiply_grouped(rows_RK, counts) + low_rank(rows_RK, counts)

    def dense(self, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        parts = zip(self.b_ENr.to(wide).chunk(self.matrices, 1), self.a_ErK.to(wide).chunk(self.matrices, 1))
        return (self.base.dense(wide) + torch.cat([b @ a for b, a in parts], 1)).to(dtype)

    @property
    def shape(self):
        return self.base.shape

    @property
    def nbytes(self):
        return self.base.nbytes + self.a_ErK.nbytes + self.b_ENr.nbytes


def held_weight(linear: ParallelLinear) -> HeldWeight:
    """Return this rank's part of a linear layer's weight as a HeldWeight."""
    weight = linear.local_weight()
    return weight if isinstance(weight, HeldWeight) else PlainWeight(weight.detach())


def dense_weight(linear: ParallelLinear, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of this rank's part of a linear layer's weight, [N, K], in whatever form they are held."""
    return held_weight(linear).dense(dtype)


def exchange(module: nn.Module, name: str, weight: HeldWeight) -> None:
    """Put `weight` in the place of the parameter `name` of a linear layer or of stacked experts, and its GEMM too."""
    if isinstance(module, ParallelLinear):
        assert name == "weight", name
        module.gemm = HeldGemm()
    else:
        setattr(module, {"gate_up_proj": "up_gemm", "down_proj": "down_gemm"}[name], HeldGemm())
    if name in dict(module.named_parameters(recurse=False)):
        delattr(module, name)
    setattr(module, name, weight)
