"""RMSNorm whose output is quantised on the way out, and whose gradient may be, for the FP8 products on either side.

    tiles_of_norm          y in 1x128 tiles, for products that alone read it; with `keep`, y itself beside them
    tiles_between          the same of a norm whose input is a product's output: the gradient of x goes back to that
                           product in 1x128 tiles (dgrad) and 128x1 tiles (wgrad), which is all it reads

What is quantised is the norm's output, rounded to its dtype (norm.py): the numbers that two steps would give.
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
    """Codes and scales of y [..., H], 1 / root mean square [..., 1], and y itself if it is to be kept."""
    y, rstd = norm_forward(x, weight, eps)
    return *encoding.quantize_1x128(y), rstd, y if keep else None


@with_backends("norm_backward_quantize")
def norm_backward_quantize(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
                           ) -> tuple[encoding.Tiles, encoding.Tiles, torch.Tensor]:
    """Of x's gradient its 1x128 tiles [..., H] and 128x1 tiles [H, R]; the weight's gradient."""
    grad_x, grad_weight = norm_backward(grad, x, weight, rstd)
    (q, scale), columns = encoding.quantize_rows_and_columns(grad_x.flatten(0, -2))
    return (q.view(x.shape), scale.view(*x.shape[:-1], -1)), columns, grad_weight


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, keep, straight):
        q, scale, rstd, y = norm_quantize(x, weight, eps, keep)
        ctx.save_for_backward(x, weight, rstd)
        ctx.straight = straight
        return BlockScaled(q, scale, x.dtype, whole=y)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        if not ctx.straight:
            return *norm_backward(grad, x, weight, rstd), None, None, None
        tiles, columns, grad_weight = norm_backward_quantize(grad, x, weight, rstd)
        return BlockScaled(*tiles, x.dtype, columns=columns), grad_weight, None, None, None


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, keep: bool, straight: bool) -> torch.Tensor:
    return _Tiles.apply(x, weight, eps, keep, straight)


tiles_of_norm = partial(_norm, keep=False, straight=False)
tiles_and_norm = partial(_norm, keep=True, straight=False)
tiles_between = partial(_norm, keep=False, straight=True)
