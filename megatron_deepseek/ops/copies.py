"""Copy each row once for each of its choices, sort the copies by choice, and sum them by weight: gathers both ways.

The choices are the experts, ranks or nodes (bins) that a row goes to. Where every choice has a copy, the copies are a
permutation, and permute.py moves them. There are fewer where a rank serves only some of the experts, or where copies
were dropped.

Shapes: Q rows, K choices of each, R <= Q*K copies, H hidden.
"""

from dataclasses import dataclass

import torch

from megatron_deepseek.ops.fp8.block_scaled import take_rows
from megatron_deepseek.ops.permute import copy_and_permute, sort_by_expert, sum_rows, weighted_sum


@dataclass(frozen=True, eq=False)
class Copies:
    """The copies of some rows, sorted by bin.

    `order_R` says which row and choice each copy is of, as row * K + choice; `place_QK` says at which of the R places
    the copy of a choice is, R if it has none. `counts` are the number of copies in each bin; bins lie one after the
    other.
    """

    order_R: torch.Tensor
    place_QK: torch.Tensor
    counts: list[int]

    @property
    def row_R(self) -> torch.Tensor:
        return self.order_R // self.place_QK.shape[1]

    @property
    def choice_R(self) -> torch.Tensor:
        return self.order_R % self.place_QK.shape[1]

    @property
    def complete(self) -> bool:
        """Return whether there are copies, and one of every choice: then they are a permutation (permute.py)."""
        return 0 < len(self.order_R) == self.place_QK.numel()


@dataclass(frozen=True, eq=False)
class SortedChoices:
    """Copies of which the host does not know yet how many there are: `counts`, int64 [bins], are still on the device.

    `order` has every choice, those without a copy behind the others; `inverse_QK` is where it has each.
    """

    order: torch.Tensor
    inverse_QK: torch.Tensor
    counts: torch.Tensor

    def cut(self, counts: list[int]) -> Copies:
        """Return the copies, given `self.counts` on the host."""
        number = sum(counts)
        return Copies(self.order[:number], self.inverse_QK.clamp(max=number), counts)


def sort_choices(bins_QK: torch.Tensor, num_bins: int) -> SortedChoices:
    """Return the copies sorted by bin, within a bin by row. A choice outside 0..num_bins-1 has none."""
    bins_QK = bins_QK.where((bins_QK >= 0) & (bins_QK < num_bins), num_bins)
    order, inverse, counts = sort_by_expert(bins_QK, num_bins + 1)
    return SortedChoices(order, inverse.view_as(bins_QK), counts[:num_bins])


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_QH, row_R, place_QK):
        ctx.save_for_backward(place_QK)
        return take_rows(x_QH, row_R)

    @staticmethod
    def backward(ctx, grad_RH):
        (place_QK,) = ctx.saved_tensors
        return sum_rows(grad_RH, place_QK), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RH, weights_QK, row_R, choice_R, place_QK):
        ctx.save_for_backward(y_RH, weights_QK, row_R, choice_R, place_QK)
        return sum_rows(y_RH, place_QK, weights_QK)

    @staticmethod
    def backward(ctx, grad_QH):
        y_RH, weights_QK, row_R, choice_R, place_QK = ctx.saved_tensors
        grad_RH = grad_QH.index_select(0, row_R)
        grad_weight_R = (grad_RH * y_RH).sum(-1).to(weights_QK.dtype)
        grad_weights_QK = torch.zeros_like(weights_QK)
        grad_weights_QK[row_R, choice_R] = grad_weight_R
        weights_R1 = weights_QK[row_R, choice_R].to(y_RH.dtype).unsqueeze(-1)
        return grad_RH.mul_(weights_R1), grad_weights_QK, None, None, None


def copy_rows(x_QH: torch.Tensor, copies: Copies) -> torch.Tensor:
    """Return the rows' copies [R, H] in the order of `copies`."""
    if copies.complete:
        return copy_and_permute(x_QH, copies.order_R, copies.place_QK.flatten())
    return _Copy.apply(x_QH, copies.row_R, copies.place_QK)


def copy_keys(keys_Q: torch.Tensor | None, copies: Copies) -> torch.Tensor | None:
    """Return the keys of the copies [R]: those of their rows; None of None."""
    return None if keys_Q is None else keys_Q[copies.row_R]


def sum_copies(y_RH: torch.Tensor, weights_QK: torch.Tensor, copies: Copies) -> torch.Tensor:
    """Return the sum of each row's copies times its weights, [Q, H] in y's dtype."""
    if copies.complete:
        return weighted_sum(y_RH, weights_QK, copies.order_R, copies.place_QK.flatten())
    return _Sum.apply(y_RH, weights_QK, copies.row_R, copies.choice_R, copies.place_QK)
