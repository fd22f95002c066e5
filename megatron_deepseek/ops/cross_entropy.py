"""Softmax cross-entropy over a part of the vocabulary: the statistics of each part, and the gradient from their totals.

    loss = log(sum) - (label_logit - max),  sum and label_logit summed over the parts, max their maximum

parallel/vocabulary.py combines the parts of several ranks.

Shapes: T tokens, v columns of this part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_deepseek.ops.backends.registry import with_backends


@with_backends("cross_entropy_statistics")
def cross_entropy_statistics(logits_Tv: torch.Tensor, labels_T: torch.Tensor, first_id: int
                             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the maximum, sum of exp(logit - maximum) and the label's logit of each row, [T] each, in at least float32.

    This part's columns are ids first_id, first_id + 1, ...; the label's logit is 0 where the label is not among them.
    The sum is 0 in a row of nothing but -inf.
    """
    wide = torch.promote_types(logits_Tv.dtype, torch.float32)
    max_T = logits_Tv.amax(-1).to(wide)
    shift_T1 = max_T.where(max_T != float("-inf"), 0).unsqueeze(-1)
    sum_T = (logits_Tv.to(wide) - shift_T1).exp_().sum(-1)
    local_T, mine_T = _columns(labels_T, logits_Tv.shape[-1], first_id)
    label_T = logits_Tv.gather(-1, local_T.unsqueeze(-1)).squeeze(-1).to(wide)
    return max_T, sum_T, label_T.where(mine_T, 0)


@with_backends("cross_entropy_gradient")
def cross_entropy_gradient(logits_Tv: torch.Tensor, labels_T: torch.Tensor, first_id: int, max_T: torch.Tensor,
                           sum_T: torch.Tensor, grad_T: torch.Tensor) -> torch.Tensor:
    """Return (softmax - one-hot label) * grad [T, v] in the logits' dtype, from the maximum and sum over all parts.

    The CUDA kernel overwrites contiguous bfloat16 logits with their gradient.
    """
    grad_Tv = (logits_Tv.to(max_T.dtype) - max_T.unsqueeze(-1)).exp_() * (grad_T / sum_T).unsqueeze(-1)
    local_T, mine_T = _columns(labels_T, logits_Tv.shape[-1], first_id)
    grad_Tv.scatter_add_(-1, local_T.unsqueeze(-1), -(grad_T * mine_T).unsqueeze(-1))
    return grad_Tv.to(logits_Tv.dtype)


def cross_entropy_gradient_in_a_pass(logits_Tv: torch.Tensor, labels_T: torch.Tensor, first_id: int,
                                     max_T: torch.Tensor, sum_T: torch.Tensor, grad_T: torch.Tensor) -> torch.Tensor:
    """Return what `cross_entropy_gradient` does, in a form that a compiler turns into one pass over the logits.

    Adding to the label's column by its place would be a second one. Without a compiler this takes more memory.
    """
    local_T, mine_T = _columns(labels_T, logits_Tv.shape[-1], first_id)
    columns_v = torch.arange(logits_Tv.shape[-1], device=logits_Tv.device)
    of_label_Tv = (columns_v == local_T.unsqueeze(-1)) & mine_T.unsqueeze(-1)
    grad_Tv = (logits_Tv.to(max_T.dtype) - max_T.unsqueeze(-1)).exp() * (grad_T / sum_T).unsqueeze(-1)
    return (grad_Tv - torch.where(of_label_Tv, grad_T.unsqueeze(-1), 0)).to(logits_Tv.dtype)


@dataclass(frozen=True)
class CrossEntropy:
    """The two functions of a part's cross-entropy, or their graphs.

    Where they are `plain` and a rank has the whole vocabulary, the CPU takes torch's own cross-entropy.
    """

    statistics: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = cross_entropy_statistics
    gradient: Callable[..., torch.Tensor] = cross_entropy_gradient
    plain: bool = True

    def compiled(self, functions: Callable[[Callable], Callable]) -> "CrossEntropy":
        """Return both taken from `functions`."""
        return CrossEntropy(functions(cross_entropy_statistics), functions(cross_entropy_gradient), False)


def _columns(labels_T: torch.Tensor, columns: int, first_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of each label (0 where another part has it), and whether this part has it."""
    local_T = labels_T - first_id
    mine_T = (local_T >= 0) & (local_T < columns)
    return local_T.where(mine_T, 0), mine_T
