"""Permutations of rows, with gathers in both directions: a permutation's transpose is the inverse permutation.

Shapes: R rows, H hidden.
"""

import torch


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, order_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        return x_RH.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad_RH):
        (inverse_R,) = ctx.saved_tensors
        return grad_RH.index_select(0, inverse_R), None, None


def invert(order_R: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order_R`."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
    return inverse_R


def permute(x_RH: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
    """Row i of the result is row order_R[i] of x."""
    return _Permute.apply(x_RH, order_R, inverse_R)
