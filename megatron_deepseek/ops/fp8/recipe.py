"""The GEMMs of the FP8 recipe as autograd functions: E4M3 forward, dgrad and wgrad (encoding.py has the formats).

    forward  x in 1x128 tiles       x  weight in 128x128 blocks
    dgrad    gradient in 1x128      x  the same blocks, transposed
    wgrad    gradient in 128x1      x  the saved x, re-tiled to 128x1

Of x only FP8 is saved: the forward's own tiles, or E5M6 after attention. Before a `down_proj` SwiGLU's inputs are saved
in FP8, and the backward computes SwiGLU's output again from them. Output and gradients have the layer's dtype. The
weight is quantised when FSDP gathers it (weight.py).

A gradient that was made by an operator of this recipe comes with both kinds of tiles (block_scaled.py).

The autograd node holds the weight itself and does not save it, for the reason that zero_bubble.py gives.

Shapes: R or M rows, I = K inputs of the weight or width of SwiGLU.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_deepseek.ops.backends.registry import with_backends
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.fp8.attention import E5M6Output, attention
from megatron_deepseek.ops.fp8.block_scaled import (
    BlockScaled,
    dequantized,
    plain,
    quantize,
    share,
    with_dequantized_gradient,
)
from megatron_deepseek.ops.fp8.e5m6 import quantize_e5m6, retile_e5m6
from megatron_deepseek.ops.fp8.gemm import grouped_scaled_mm, grouped_scaled_mm_wgrad, scaled_mm
from megatron_deepseek.ops.fp8.norm import tiles_and_norm, tiles_between, tiles_of_norm
from megatron_deepseek.ops.fp8.weight import Fp8Shard, blocks_of, transposed_of
from megatron_deepseek.ops.precision_recipe import Deferred, Gemm, PrecisionRecipe
from megatron_deepseek.ops.recompute import kept
from megatron_deepseek.ops.swiglu import gate_and_up, swiglu_backward, swiglu_forward

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Fp8Gemm(Gemm):
    """A GEMM in FP8.

    `input_power_of_two`: the scales of the input's tiles are rounded up to powers of two; otherwise they are any
    float32.

    `dispatched_gradient`: so are those of the output's gradient, which may have come from its tokens' ranks as FP8.
    Wgrad then takes it from those 1x128 tiles wherever they were made, so that all layouts compute the same.

    `cache_e5m6`: save the input for wgrad as E5M6 instead of the forward's E4M3. `sharing` (ops/recompute.py) is `kept`
    or `recomputed`: whether an input that several GEMMs share is saved, or quantised again in the backward.

    `gather_fp8`: FSDP gathers the weight as FP8.
    """

    input_power_of_two: bool = False
    dispatched_gradient: bool = False
    cache_e5m6: bool = False
    gather_fp8: bool = False
    sharing: Callable[..., AbstractContextManager] = kept
    deferred: Deferred | None = None

    def __call__(self, x, weight, *counts):
        return _Multiply.apply(x, weight, self, *counts)

    def after_swiglu(self, gate_up, weight, *counts):
        return _MultiplySwiGLU.apply(self, counts, weight, *gate_up)

    def gathered(self, shard):
        return Fp8Shard(shard, self.gather_fp8)

    def shared(self, x):
        return nullcontext(x) if isinstance(x, BlockScaled) else self.sharing(self.rows, x)

    def rows(self, x):
        return share(x, self.input_power_of_two)

    def seen(self, x):
        return dequantized(self.rows(x))

    def gradient_seen(self, y):
        return with_dequantized_gradient(y, self.dispatched_gradient)

    def deferring(self, deferred):
        return replace(self, deferred=deferred)

    def gradient_tiles(self, grad: torch.Tensor, weight: torch.Tensor, *counts: Sequence[int]
                       ) -> tuple[BlockScaled, encoding.Tiles | None]:
        """Return the output gradient's tiles for dgrad, and those for wgrad, None if the weight is frozen."""
        if self.dispatched_gradient:
            grad = quantize(grad, power_of_two=True)
        if not weight.requires_grad:
            return quantize(grad), None
        if isinstance(grad, BlockScaled):
            tiles = _rows(grad)
            return grad, grad.columns or encoding.retile_128x1(tiles.q, tiles.scale, self.dispatched_gradient, *counts)
        rows, columns = encoding.quantize_rows_and_columns(grad.flatten(0, -2), False, *counts)
        return _as_gradient((rows, columns), grad), columns

    def keep(self, x: torch.Tensor, tiles: BlockScaled) -> Tensors:
        """Return what is to be saved of x for wgrad; `columns` makes wgrad's tiles of it."""
        if not self.cache_e5m6:
            return tiles.q, tiles.scale
        return (isinstance(x, BlockScaled) and x.kept) or quantize_e5m6(x.flatten(0, -2))

    def columns(self, kept: Tensors, size: int, *counts: Sequence[int]) -> Tensors:
        """Return the 128x1 tiles of x from what `keep` returned; `size` is x's width."""
        if self.cache_e5m6:
            return retile_e5m6(*kept, size, self.input_power_of_two, *counts)
        return encoding.retile_128x1(*kept, self.input_power_of_two, *counts)

    def weight_gradient(self, weight: torch.Tensor, gradient: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Return `gradient()`, or None after deferring it; None for a frozen weight."""
        if not weight.requires_grad:
            return None
        return gradient() if self.deferred is None else self.deferred.defer(weight, gradient)


def recipe(sharing: Callable[..., AbstractContextManager] = kept, gather_fp8: bool = False) -> PrecisionRecipe:
    """Return which GEMM takes which precision (DeepSeek-V3 report, sections 3.3.2 and 3.3.3)."""
    gemm = partial(Fp8Gemm, gather_fp8=gather_fp8)
    return PrecisionRecipe(
        linear=gemm(sharing=sharing),
        attention_output=gemm(input_power_of_two=True, cache_e5m6=True),
        experts_up=gemm(input_power_of_two=True),
        experts_down=gemm(dispatched_gradient=True),
        to_experts=partial(quantize, power_of_two=True),
        norm=tiles_of_norm, norm_of_product=tiles_between, norm_for_all=tiles_and_norm,
        attention=attention, attention_output_form=E5M6Output())


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gemm: Fp8Gemm, *counts):
        ctx.weight, ctx.gemm, ctx.counts = weight, gemm, counts
        tiles = _rows(quantize(x, gemm.input_power_of_two))
        ctx.save_for_backward(*(gemm.keep(x, tiles) if weight.requires_grad else ()))
        return _with_rows_of(x, _forward(tiles, weight, *counts))

    @staticmethod
    def backward(ctx, grad):
        gemm, weight, counts, size = ctx.gemm, ctx.weight, ctx.counts, ctx.weight.shape[-1]
        rows, columns = gemm.gradient_tiles(grad, weight, *counts)
        grad_x = _dgrad(rows, weight, *counts) if ctx.needs_input_grad[0] else None
        kept, dtype = ctx.saved_tensors, grad.dtype  # no more of the gradient: wgrad may wait for long

        def wgrad():
            return _wgrad(columns, gemm.columns(kept, size, *counts), dtype, *counts)

        return grad_x, gemm.weight_gradient(weight, wgrad), None, *(None for _ in counts)


class _MultiplySwiGLU(torch.autograd.Function):
    """The GEMM of silu(gate) * up.

    `gate_up` is gate and up, or one tensor with both side by side, which then has one gradient in tiles that begin at
    gate.
    """

    @staticmethod
    def forward(ctx, gemm: Fp8Gemm, counts, weight, *gate_up):
        ctx.weight, ctx.gemm, ctx.counts, ctx.joint = weight, gemm, counts, len(gate_up) == 1
        gate, up = gate_and_up(*gate_up)
        ctx.save_for_backward(*encoding.quantize_1x128(gate.flatten(0, -2)),
                              *encoding.quantize_1x128(up.flatten(0, -2)))
        tiles = _rows(BlockScaled(*quantize_swiglu(gate, up, gemm.input_power_of_two), gate.dtype))
        return _with_rows_of(gate, _forward(tiles, weight, *counts))

    @staticmethod
    def backward(ctx, grad):
        gemm, weight, counts = ctx.gemm, ctx.weight, ctx.counts
        rows, columns = gemm.gradient_tiles(grad, weight, *counts)
        gate_q, gate_s, up_q, up_s = ctx.saved_tensors
        gate, up = (BlockScaled(*kept, grad.dtype) for kept in ((gate_q, gate_s), (up_q, up_s)))
        gradients, grad_weight = (None,) * len(ctx.needs_input_grad[3:]), None
        if any(ctx.needs_input_grad[3:]):
            grad_hidden = _dgrad(rows, weight, *counts).flatten(0, -2)
            tiles = swiglu_backward_tiles(grad_hidden, gate, up, ctx.joint, *counts)
            gradients = tuple(_as_gradient(each, grad) for each in tiles)
        if weight.requires_grad:
            hidden, dtype = quantize_swiglu_columns(gate, up, gemm.input_power_of_two, *counts), grad.dtype
            grad_weight = gemm.weight_gradient(weight, lambda: _wgrad(columns, hidden, dtype, *counts))
        return None, None, grad_weight, *gradients


@with_backends("quantize_swiglu")
def quantize_swiglu(gate: torch.Tensor, up: torch.Tensor, power_of_two: bool) -> encoding.Tiles:
    """Return silu(gate) * up in 1x128 tiles."""
    return encoding.quantize_1x128.reference(swiglu_forward(gate, up), power_of_two)


@with_backends("quantize_swiglu_columns")
def quantize_swiglu_columns(gate: torch.Tensor, up: torch.Tensor, power_of_two: bool, *counts: Sequence[int]
                            ) -> encoding.Tiles:
    """Return silu(gate) * up, [R, I] each, in 128x1 tiles of rows; gate and up may be tiles themselves."""
    return encoding.quantize_128x1.reference(swiglu_forward(plain(gate), plain(up)), power_of_two, *counts)


@with_backends("swiglu_backward_tiles")
def swiglu_backward_tiles(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, joint: bool,
                          *counts: Sequence[int]) -> tuple[tuple[encoding.Tiles, encoding.Tiles], ...]:
    """Return the gradients of gate and up, [R, I] each, in 1x128 and 128x1 tiles; one pair [R, 2I] if `joint`.

    Gate and up may be tiles themselves, as they are kept for the backward.
    """
    gradients = swiglu_backward(grad, plain(gate), plain(up))
    parts = (torch.cat(gradients, -1),) if joint else gradients
    return tuple(encoding.quantize_rows_and_columns.reference(part, False, *counts) for part in parts)


def _as_gradient(tiles: tuple[encoding.Tiles, encoding.Tiles], like: torch.Tensor) -> BlockScaled:
    """Return [..., K] made of 1x128 and 128x1 tiles of [R, K], with the leading dimensions of `like`."""
    (q, scale), columns = tiles
    rows = like.shape[:-1]
    return BlockScaled(q.view(*rows, q.shape[-1]), scale.view(*rows, scale.shape[-1]), like.dtype, columns=columns)


def _rows(tiles: BlockScaled) -> BlockScaled:
    """Return [..., K] as [M, K]."""
    return tiles if tiles.ndim == 2 else tiles.map(lambda part: part.flatten(0, -2))


def _with_rows_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return y [M, K] as [..., K] with x's leading dimensions; y itself if x is a matrix: FSDP objects to views."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _forward(x: BlockScaled, weight: torch.Tensor, *counts: Sequence[int]) -> torch.Tensor:
    multiply = grouped_scaled_mm if counts else scaled_mm
    return multiply(x.q, x.scale, *blocks_of(weight), *counts, out_dtype=x.dtype)


def _dgrad(grad: BlockScaled, weight: torch.Tensor, *counts: Sequence[int]) -> torch.Tensor:
    """Return the gradient of x [..., I]."""
    multiply = grouped_scaled_mm if counts else scaled_mm
    tiles = _rows(grad)
    return _with_rows_of(grad, multiply(tiles.q, tiles.scale, *transposed_of(weight), *counts, out_dtype=grad.dtype))


def _wgrad(grad: encoding.Tiles, x: encoding.Tiles, dtype: torch.dtype, *counts: Sequence[int]) -> torch.Tensor:
    multiply = grouped_scaled_mm_wgrad if counts else scaled_mm
    return multiply(*grad, *x, *counts, out_dtype=dtype)
