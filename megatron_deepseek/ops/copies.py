"""Copies of rows for their choices, sorted by what was chosen, and their weighted sum: gathers both ways.

Plain indexing would scatter-add in its backward, which is slow and, on CUDA, not deterministic. A row has K copies
where all its choices are served, fewer where a rank serves only some of the experts or copies were dropped.

Shapes: Q rows, K choices of each, R <= Q*K copies, H hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class Copies:
    """`row_R`, `choice_R`: whose copy each is and for which choice; `place_QK`: where it lies, R where there is none.

    `counts`: copies of each bin, which lie one bin after the other.
    """

    row_R: torch.Tensor
    choice_R: torch.Tensor
    place_QK: torch.Tensor
    counts: list[int]


def sort_copies(bins_QK: torch.Tensor, num_bins: int) -> Copies:
    """Copies by bin, within a bin by row. A choice outside 0..num_bins-1 has none."""
    bins = bins_QK.flatten()
    bins = bins.where((bins >= 0) & (bins < num_bins), num_bins)
    counts = bins.bincount(minlength=num_bins + 1)[:num_bins].tolist()
    number = sum(counts)
    order_R = bins.argsort(stable=True)[:number]
    place = torch.full_like(bins, number)
    place[order_R] = torch.arange(number, device=bins.device)
    width = bins_QK.shape[1]
    return Copies(order_R // width, order_R % width, place.view_as(bins_QK), counts)


def _gather(x_RH: torch.Tensor, place_QK: torch.Tensor) -> torch.Tensor:
    """[Q, K, H]: the copies of each row, zero where there is none."""
    if x_RH.shape[0] < place_QK.numel():
        x_RH = F.pad(x_RH, (0, 0, 0, 1))
    return x_RH.index_select(0, place_QK.flatten()).unflatten(0, place_QK.shape)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_QH, row_R, place_QK):
        ctx.save_for_backward(place_QK)
        return x_QH.index_select(0, row_R)

    @staticmethod
    def backward(ctx, grad_RH):
        (place_QK,) = ctx.saved_tensors
        return _gather(grad_RH, place_QK).sum(1), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RH, weights_QK, row_R, choice_R, place_QK):
        ctx.save_for_backward(y_RH, weights_QK, row_R, choice_R, place_QK)
        return torch.bmm(weights_QK.to(y_RH.dtype).unsqueeze(1), _gather(y_RH, place_QK)).squeeze(1)

    @staticmethod
    def backward(ctx, grad_QH):
        y_RH, weights_QK, row_R, choice_R, place_QK = ctx.saved_tensors
        grad_RH = grad_QH.index_select(0, row_R)
        grad_weight_R = (grad_RH * y_RH).sum(-1).to(weights_QK.dtype)
        grad_weights_QK = torch.zeros_like(weights_QK)
        grad_weights_QK[row_R, choice_R] = grad_weight_R
        return grad_RH * weights_QK[row_R, choice_R].to(y_RH.dtype).unsqueeze(-1), grad_weights_QK, None, None, None


def copy_rows(x_QH: torch.Tensor, copies: Copies) -> torch.Tensor:
    """[R, H] in the order of `copies`."""
    return _Copy.apply(x_QH, copies.row_R, copies.place_QK)


def sum_copies(y_RH: torch.Tensor, weights_QK: torch.Tensor, copies: Copies) -> torch.Tensor:
    """[Q, H]: each row's copies times its weights, in y's dtype."""
    return _Sum.apply(y_RH, weights_QK, copies.row_R, copies.choice_R, copies.place_QK)
