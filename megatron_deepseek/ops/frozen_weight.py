"""Products with frozen weights that are kept as NF4 or FP8 (QLoRA, arXiv 2305.14314): plain numbers for each use.

A weight is two tensors of bytes, codes and scales, which FSDP gathers like any other; a `Form` says what numbers they
stand for. `FrozenGemm` is a GEMM like any other (precision_recipe.py): no layer knows what its weight is. Forward and
backward make the numbers anew, in the dtype of what they are multiplied with, and keep nothing of them: of experts on
the CPU one matrix at a time, and none of an expert that no token chose. Under the FP8 recipe (fp8/recipe.py) FP8
weights are multiplied as they are.

The bytes are held by the autograd node and not saved, for the reason that zero_bubble.py gives.

Shapes: R rows, E experts, N outputs, K inputs of this rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.ops import nf4
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.fp8.weight import Fp8Weight
from megatron_deepseek.ops.grouped_gemm import grouped_dgrad, grouped_forward, has_native_kernel
from megatron_deepseek.ops.precision_recipe import Deferred, Gemm, GemmOver, LinearAtOnce
from megatron_deepseek.ops.products import by_weight, linear
from megatron_deepseek.ops.recompute import kept

Bytes = tuple[torch.Tensor, torch.Tensor]  # codes [..., N, c] and scales [..., s, d], uint8
_OF_ROW = 8  # bytes of doubly quantised scales that belong to a row: two numbers of float32


class Form(ABC):
    """What bytes stand for: `columns` numbers of each row."""

    columns: int

    @abstractmethod
    def dense(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers [..., N, K]."""

    @abstractmethod
    def pack(self, numbers: torch.Tensor, columns: slice) -> Bytes:
        """Return the bytes of `columns` of whole rows [n, K], which begin where a block does.

        Raise ValueError if a number is not finite.
        """


@dataclass(frozen=True)
class Nf4Form(Form):
    """NF4 with a scale for 64 numbers of a row; `double`: scales as codes, with 8 bytes for each row behind them."""

    columns: int
    double: bool

    def dense(self, codes, scales, dtype):
        return nf4.dequantize(nf4.Nf4(codes, self._scales(scales), self.columns), dtype)

    def _scales(self, scales: torch.Tensor) -> torch.Tensor | nf4.DoubleScales:
        if not self.double:
            return scales.view(torch.float32)
        of_rows = scales[..., -_OF_ROW:].contiguous().view(torch.float32)
        return nf4.DoubleScales(scales[..., :-_OF_ROW].contiguous().view(encoding.E4M3), of_rows)

    def pack(self, numbers, columns):
        made = nf4.quantize(numbers)
        made = (made.with_double_scales() if self.double else made).cut(columns)
        if not self.double:
            return made.codes, made.scales.contiguous().view(torch.uint8)
        codes, of_rows = made.scales.codes.view(torch.uint8), made.scales.of_rows.view(torch.uint8)
        return made.codes, torch.cat((codes, of_rows), -1)


@dataclass(frozen=True)
class Fp8Form(Form):
    """E4M3 in blocks of 128 x 128, or `by_row`, with the scales of the blocks given to each row."""

    columns: int
    by_row: bool

    def dense(self, codes, scales, dtype):
        make = encoding.dequantize_1x128 if self.by_row else encoding.dequantize_128x128
        return make(codes.view(encoding.E4M3), scales.view(torch.float32), dtype)

    def pack(self, numbers, columns):
        codes, scales = encoding.quantize_128x128(numbers)
        if scales.isnan().any():
            raise ValueError("it has values that are not finite, which FP8 cannot hold")
        return self.pack_blocks(codes, scales, columns)

    def pack_blocks(self, codes: torch.Tensor, scales: torch.Tensor, columns: slice) -> Bytes:
        """Return the bytes of `columns` of whole rows [n, K] that are FP8 already; they begin where a block does."""
        scales = scales[:, columns.start // encoding.TILE:encoding.num_tiles(columns.stop)]
        if self.by_row:
            scales = scales.repeat_interleave(encoding.TILE, 0)[:len(codes)]
        return codes[:, columns].view(torch.uint8), scales.contiguous().view(torch.uint8)

    def weight(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Fp8Weight:
        """Return what the FP8 recipe multiplies by: the same codes, whose transpose is made where it is needed."""
        blocks = codes.view(encoding.E4M3), scales.view(torch.float32)
        return Fp8Weight(blocks, partial(_transposed, *blocks), dtype)


def _transposed(codes: torch.Tensor, scales: torch.Tensor) -> Bytes:
    return tuple(part.mT.contiguous() if on_accelerator(part) else part.mT for part in (codes, scales))


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """The bytes of a weight [N, K], or of experts [E, N, K], and what they stand for."""

    form: Form
    codes: torch.Tensor
    scales: torch.Tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers: of experts made one by one, since on the way there are wider ones."""
        if self.codes.ndim == 2:
            return self.form.dense(self.codes, self.scales, dtype)
        out = torch.empty(*self.codes.shape[:2], self.form.columns, dtype=dtype, device=self.codes.device)
        for expert, codes, scales in zip(out, self.codes, self.scales, strict=True):
            expert.copy_(self.form.dense(codes, scales, dtype))
        return out

    def expert(self, index: int) -> "FrozenWeight":
        """Return a stack of one expert."""
        part = slice(index, index + 1)
        return FrozenWeight(self.form, self.codes[part], self.scales[part])


@dataclass(frozen=True)
class FrozenGemm(GemmOver):
    """The GEMM `base` with the weight that `weight_of` makes of codes, of `scales()` and of the layer's dtype."""

    scales: Callable[[], torch.Tensor]
    weight_of: Callable[[torch.Tensor, torch.Tensor, torch.dtype], Any]

    def __call__(self, x, weight, *counts):
        return self.base(x, self.weight_of(weight, self.scales(), x.dtype), *counts)

    def after_swiglu(self, gate_up, weight, *counts):
        return self.base.after_swiglu(gate_up, self.weight_of(weight, self.scales(), gate_up[0].dtype), *counts)

    def deferring(self, deferred: Deferred) -> "FrozenGemm":
        return self


def dequantising(base: Gemm, form: Form, scales: Callable[[], torch.Tensor]) -> FrozenGemm:
    """Return a GEMM that makes the numbers of its weight for each use; SwiGLU's output is kept as by `base`."""
    product = LinearAtOnce(multiply=multiply, activate=base.activate or kept)
    return FrozenGemm(product, scales, lambda codes, scales, dtype: FrozenWeight(form, codes, scales))


def as_released(base: Gemm, form: Fp8Form, scales: Callable[[], torch.Tensor]) -> FrozenGemm:
    """Return the FP8 GEMM `base` over blocks that are FP8 already."""
    return FrozenGemm(base, scales, form.weight)


def multiply(x: torch.Tensor, weight: FrozenWeight, *counts: list[int]) -> torch.Tensor:
    """Return x [..., K] times the transposed weight, [..., N]; with `counts`, each expert's rows times its own."""
    return _Multiply.apply(x, weight, *counts)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, *counts):
        ctx.weight, ctx.counts = weight, counts
        return _of_experts(grouped_forward, x, weight, *counts) if counts else linear(x, weight.dense(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        weight, counts, grad_x = ctx.weight, ctx.counts, None
        if ctx.needs_input_grad[0]:
            grad_x = _of_experts(grouped_dgrad, grad.contiguous(), weight, *counts) if counts else \
                by_weight(grad, weight.dense(grad.dtype))
        return grad_x, None, *(None for _ in counts)


def _of_experts(product: Callable, x: torch.Tensor, weight: FrozenWeight, counts: list[int]) -> torch.Tensor:
    """Return a grouped product: of all experts at once where there is a kernel for it, else one by one."""
    if has_native_kernel(x, weight.codes.shape[-2], weight.form.columns):
        return product(x, weight.dense(x.dtype), counts)
    parts = [product(rows, weight.expert(index).dense(x.dtype), [len(rows)])
             for index, rows in enumerate(x.split(counts)) if len(rows)]
    if parts:
        return torch.cat(parts)
    return product(x, x.new_empty(1, weight.codes.shape[-2], weight.form.columns), [0])
