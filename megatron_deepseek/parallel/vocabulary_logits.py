"""Logits whose columns are divided over TP ranks, and what can be computed of all columns without gathering them.

Shapes: T tokens, V vocabulary, v = V/tp this rank's part of it, K ids of each token.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_deepseek.parallel.collectives import sum_alike
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary import local_ids, log_normalizer


@dataclass(frozen=True, eq=False)
class VocabularyLogits:
    """Logits of T tokens over the whole vocabulary, through the properties and methods below.

    `local_Tv` are this rank's columns, from tp.rank * v on. Everything else is the same on all TP ranks, in at least
    float32, and differentiable. Each method costs TP collectives of [T] or [T, K] numbers, so all ranks must call the
    same ones in the same order.
    """

    local_Tv: torch.Tensor
    tp: TensorParallel

    @cached_property
    def wide_Tv(self) -> torch.Tensor:
        """Return the local logits in at least float32."""
        return self.local_Tv.to(torch.promote_types(self.local_Tv.dtype, torch.float32))

    @cached_property
    def log_normalizer_T(self) -> torch.Tensor:
        """Return the log of the sum of exp(logit) over the vocabulary."""
        return log_normalizer(self.wide_Tv, self.tp)

    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """Return log p of the vocabulary's ids [T] or [T, K], in their shape."""
        local_TK, mine_TK = local_ids(ids.view(len(ids), -1), self.local_Tv.shape[-1], self.tp)
        own_TK = self.wide_Tv.gather(-1, local_TK).where(mine_TK, 0)
        logits_TK = own_TK if self.tp.size == 1 else sum_alike(own_TK, self.tp.group)
        return (logits_TK - self.log_normalizer_T.unsqueeze(-1)).view_as(ids)

    def entropy(self) -> torch.Tensor:
        """Return -sum of p log p over the vocabulary, in nats, [T]."""
        return _Entropy.apply(self.wide_Tv, self.log_normalizer_T.detach(), self.tp)


class _Entropy(torch.autograd.Function):
    """The entropy, whose derivative by a logit is -p (log p + entropy), the normaliser's part included.

    An id whose probability is 0 adds nothing, whatever its logit.
    """

    @staticmethod
    def forward(ctx, logits_Tv, log_normalizer_T, tp):
        log_Tv = logits_Tv - log_normalizer_T.unsqueeze(-1)
        entropy_T = torch.special.entr(log_Tv.exp_()).sum(-1)
        entropy_T = entropy_T if tp.size == 1 else sum_alike(entropy_T, tp.group)
        ctx.save_for_backward(logits_Tv, log_normalizer_T, entropy_T)
        return entropy_T

    @staticmethod
    def backward(ctx, grad_T):
        logits_Tv, log_normalizer_T, entropy_T = ctx.saved_tensors
        log_Tv = logits_Tv - log_normalizer_T.unsqueeze(-1)
        p_Tv = log_Tv.exp()
        log_Tv.masked_fill_(p_Tv == 0, 0).add_(entropy_T.unsqueeze(-1))
        return p_Tv.mul_(log_Tv).mul_(-grad_T.unsqueeze(-1)), None, None
