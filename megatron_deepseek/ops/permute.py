"""Sort token copies by expert and bring them back, with gathers in both directions.

Plain indexing would scatter-add in its backward, which is slow and, on CUDA, not deterministic. The transpose of a
permutation is its inverse, so here every forward and backward is a gather.

Shapes: T tokens, K copies of each (top-k), R = T*K rows, H hidden, W bytes of a row, Q rows gathered.
"""

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.ops.backends.registry import with_backends
from megatron_deepseek.ops.products import multiply_each


@with_backends("gather_rows")
def gather_rows(x_RW: torch.Tensor, index_Q: torch.Tensor) -> torch.Tensor:
    """Return rows index_Q of x, without a gradient. Used for FP8 codes and their scales, which are rows of bytes."""
    return x_RW.index_select(0, index_Q)


def sum_rows(x_RH: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum over k of x[place_TK], times `weights_TK` where given, [T, H], without a gradient.

    A place of R stands for no row. Nothing of the size of the rows is made: torch's kernel for bags of embeddings adds
    them as it reads them, in at least float32. Not so in bfloat16 on the CPU, where that kernel rounds halves away from
    zero, which sums of few numbers often are, so that they would grow.
    """
    num_rows = len(x_RH)
    if not num_rows:
        return x_RH.new_zeros(len(place_TK), x_RH.shape[1])
    weights_TK = torch.ones_like(place_TK, dtype=x_RH.dtype) if weights_TK is None else weights_TK.to(x_RH.dtype)
    weights_TK, place_TK = weights_TK.where(place_TK < num_rows, 0), place_TK.clamp(max=num_rows - 1)
    if x_RH.device.type == "cpu" and not on_accelerator(x_RH) and x_RH.dtype == torch.bfloat16:
        x_TKH = x_RH.index_select(0, place_TK.flatten()).unflatten(0, place_TK.shape)
        return multiply_each(weights_TK.unsqueeze(1), x_TKH).squeeze(1)
    return F.embedding_bag(place_TK, x_RH, mode="sum", per_sample_weights=weights_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, order_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        return x_RH.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad_RH):
        (inverse_R,) = ctx.saved_tensors
        return grad_RH.index_select(0, inverse_R), None, None


class _CopyAndPermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, order_R, inverse_R, num_copies):
        ctx.save_for_backward(inverse_R)
        ctx.num_copies = num_copies
        return x_TH.index_select(0, order_R // num_copies)

    @staticmethod
    def backward(ctx, grad_RH):
        (inverse_R,) = ctx.saved_tensors
        return sum_rows(grad_RH, inverse_R.unflatten(0, (-1, ctx.num_copies))), None, None, None


class _WeightedSum(torch.autograd.Function):
    """The weighted sum of a token's K expert outputs, taken straight from the sorted rows."""

    @staticmethod
    def forward(ctx, y_RH, weights_TK, order_R, inverse_R):
        ctx.save_for_backward(y_RH, weights_TK, order_R, inverse_R)
        return sum_rows(y_RH, inverse_R.view_as(weights_TK), weights_TK)

    @staticmethod
    def backward(ctx, grad_TH):
        y_RH, weights_TK, order_R, inverse_R = ctx.saved_tensors
        y_TKH = y_RH.index_select(0, inverse_R).unflatten(0, weights_TK.shape)
        grad_weights_TK = multiply_each(y_TKH, grad_TH.unsqueeze(-1)).squeeze(-1).to(weights_TK.dtype)
        weights_R1 = weights_TK.to(grad_TH.dtype).flatten().index_select(0, order_R).unsqueeze(-1)
        grad_RH = grad_TH.index_select(0, order_R // weights_TK.shape[1]).mul_(weights_R1)
        return grad_RH, grad_weights_TK, None, None


def invert(order_R: torch.Tensor) -> torch.Tensor:
    """Return the permutation that undoes `order_R`."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
    return inverse_R


def count_choices(choices: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Return how many of `choices`, numbers from 0 to num_bins - 1, are each number: int64 [num_bins].

    On an accelerator bincount would have the host wait, to look for numbers out of range.
    """
    chosen = choices.flatten()
    return chosen.new_zeros(num_bins).scatter_add_(0, chosen, torch.ones_like(chosen))


@with_backends("sort_by_expert")
def sort_by_expert(experts_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the order of the copies by expert, then token; its inverse; and how many each expert has, int64 [E]."""
    order_R = experts_TK.flatten().argsort(stable=True)
    return order_R, invert(order_R), count_choices(experts_TK, num_experts)


@with_backends("permute")
def permute(x_RH: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
    """Return rows order_R of x: row i of the result is row order_R[i]."""
    return _Permute.apply(x_RH, order_R, inverse_R)


@with_backends("copy_and_permute")
def copy_and_permute(x_TH: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
    """Return the copies of tokens in sorted order: row i of the result is token order_R[i] // K of x."""
    num_copies = order_R.shape[0] // x_TH.shape[0] if x_TH.shape[0] else 1  # 1: this rank received no token
    return _CopyAndPermute.apply(x_TH, order_R, inverse_R, num_copies)


@with_backends("weighted_sum")
def weighted_sum(y_RH: torch.Tensor, weights_TK: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor
                 ) -> torch.Tensor:
    """Undo `copy_and_permute` and return the sum of each token's copies times its weights, [T, H] in y's dtype."""
    return _WeightedSum.apply(y_RH, weights_TK, order_R, inverse_R)
