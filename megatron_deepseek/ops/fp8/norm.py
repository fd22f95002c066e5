"""RMSNorm that quantises its output, and where it helps its input's gradient, for the FP8 GEMMs beside it.

    tiles_of_norm   returns y in 1x128 tiles, for norms whose output only GEMMs read
    tiles_and_norm  returns the same tiles with y itself beside them (`BlockScaled.whole`), where others read it too
    tiles_between   is tiles_of_norm where x is a GEMM's output: the gradient of x goes back to that GEMM in 1x128 tiles
                    (dgrad) and 128x1 tiles (wgrad), which is all that it reads

What is quantised is the norm's output, rounded to its dtype (norm.py), so that one kernel gives the numbers of two
steps.

Shapes: R rows, H features.
"""

from functools import partial

import torch

from megatron_deepseek.ops.backends.registry import with_backends
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled
from megatron_deepseek.ops.norm import norm_backward, norm_forward


@with_backends("norm_quantize")
def norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float, keep: bool
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes and scales of y [..., H], 1 / root mean square [..., 1], and y itself if `keep`, else None."""
    y, rstd = norm_forward(x, weight, eps)
    return *encoding.quantize_1x128.reference(y), rstd, y if keep else None


@with_backends("norm_backward_quantize")
def norm_backward_quantize(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
                           ) -> tuple[encoding.Tiles, encoding.Tiles, torch.Tensor]:
    """Return 1x128 tiles [..., H] and 128x1 tiles [H, R] of x's gradient, and the weight's gradient."""
    grad_x, grad_weight = norm_backward.reference(grad, x, weight, rstd)
    (q, scale), columns = encoding.quantize_rows_and_columns.reference(grad_x.flatten(0, -2))
    return (q.view(x.shape), scale.view(*x.shape[:-1], -1)), columns, grad_weight


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, keep, tile_gradient):
        q, scale, rstd, y = norm_quantize(x, weight, eps, keep)
        ctx.save_for_backward(x, weight, rstd)
        ctx.tile_gradient = tile_gradient
        return BlockScaled(q, scale, x.dtype, whole=y)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        if not ctx.tile_gradient:
            return *norm_backward(grad, x, weight, rstd), None, None, None
        tiles, columns, grad_weight = norm_backward_quantize(grad, x, weight, rstd)
        return BlockScaled(*tiles, x.dtype, columns=columns), grad_weight, None, None, None


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, keep: bool, tile_gradient: bool) -> torch.Tensor:
    return _Tiles.apply(x, weight, eps, keep, tile_gradient)


tiles_of_norm = partial(_norm, keep=False, tile_gradient=False)
tiles_and_norm = partial(_norm, keep=True, tile_gradient=False)
tiles_between = partial(_norm, keep=False, tile_gradient=True)
