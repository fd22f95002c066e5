"""A divergence of two models' distributions over a vocabulary that TP ranks share: columns are never gathered.

A divergence is a sum over the vocabulary of terms f(p, q). Its derivative by a logit of p is p g - p sum(p g), where g
is the derivative of the sum by p. So the forward needs one collective, of two numbers for each token, and the backward
none.

Shapes: T tokens, v this rank's part of the vocabulary.
"""

from typing import Protocol

import torch

from megatron_deepseek.parallel.collectives import all_reduce
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits


class Divergence(Protocol):
    """The terms of a divergence, elementwise, of log p and log q: p is learnt, q is constant."""

    def terms(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Return what each entry adds to the divergence."""

    def slopes(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Return p times the derivative of the sum by p; a constant in that derivative may be left out."""


def vocabulary_divergence(logits: VocabularyLogits, other: VocabularyLogits, divergence: Divergence) -> torch.Tensor:
    """Return the divergence of each token, [T], in at least float32, with its gradient in `logits` alone.

    Both have the same columns on each rank. The result is the same on all TP ranks.
    """
    return _Divergence.apply(logits.wide_Tv, logits.log_probabilities_of_all(), other.log_probabilities_of_all(),
                             divergence, logits.tp)


class _Divergence(torch.autograd.Function):
    """A divergence as a function of the logits of p, whose log-probabilities are given beside them."""

    @staticmethod
    def forward(ctx, logits_Tv, log_p_Tv, log_q_Tv, divergence, tp):
        sums_2T = torch.stack([each(log_p_Tv, log_q_Tv).sum(-1) for each in (divergence.terms, divergence.slopes)])
        sums_2T = sums_2T if tp.size == 1 else all_reduce(sums_2T, tp.group)
        ctx.save_for_backward(log_p_Tv, log_q_Tv, sums_2T[1])
        ctx.slopes = divergence.slopes
        return sums_2T[0]

    @staticmethod
    def backward(ctx, grad_T):
        log_p_Tv, log_q_Tv, slope_T = ctx.saved_tensors
        gradient_Tv = ctx.slopes(log_p_Tv, log_q_Tv).addcmul_(log_p_Tv.exp(), slope_T.unsqueeze(-1), value=-1)
        return gradient_Tv.mul_(grad_T.unsqueeze(-1)), None, None, None, None
