"""Logits whose columns are divided over TP ranks, and what can be computed of all columns without gathering them.

Shapes: T tokens, V vocabulary, v = V/tp this rank's part of it, K or M ids of each token.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.collectives import all_gather, sum_alike
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary import local_ids, log_normalizer

_NEVER = -1e30  # the logit of an id that is left out: its probability is 0, and 0 times its logarithm is 0


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

    def are_likeliest(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return whether no id has a larger logit than that of `ids_T`, bool [T]; an equal one may have."""
        local_T, mine_T = local_ids(ids_T, self.local_Tv.shape[-1], self.tp)
        wide_Tv = self.wide_Tv.detach()
        logit_T = wide_Tv.gather(-1, local_T.unsqueeze(-1)).squeeze(-1).where(mine_T, -torch.inf)
        largest_2T = torch.stack([wide_Tv.amax(-1), logit_T])
        if self.tp.size > 1:
            dist.all_reduce(largest_2T, op=dist.ReduceOp.MAX, group=self.tp.group)
        return largest_2T[1] >= largest_2T[0]

    def likeliest(self) -> torch.Tensor:
        """Return the id with the largest logit, int64 [T]; of equal ones the lowest."""
        largest_T, local_T = self.wide_Tv.detach().max(-1)
        ids_T = local_T + self.tp.rank * self.local_Tv.shape[-1]
        if self.tp.size == 1:
            return ids_T
        all_T = largest_T.clone()
        dist.all_reduce(all_T, op=dist.ReduceOp.MAX, group=self.tp.group)
        ids_T = ids_T.where(largest_T == all_T, torch.iinfo(torch.int64).max)
        dist.all_reduce(ids_T, op=dist.ReduceOp.MIN, group=self.tp.group)
        return ids_T

    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """Return log p of the vocabulary's ids [T] or [T, K], in their shape."""
        logits_TK = self._logits_of(ids.view(len(ids), -1))
        return (logits_TK - self.log_normalizer_T.unsqueeze(-1)).view_as(ids)

    def log_probabilities_among(self, ids_T: torch.Tensor, kept_TM: torch.Tensor) -> torch.Tensor:
        """Return log p of the vocabulary's ids [T] in the softmax over each token's kept ids alone, of which it is one.

        -1 is no id; a token without any has the whole vocabulary.
        """
        there_TM = kept_TM >= 0
        logits_TM = self._logits_of(torch.cat([ids_T.unsqueeze(-1), kept_TM.long()], -1))
        among_T = logits_TM[:, 1:].masked_fill(~there_TM, -torch.inf).logsumexp(-1)
        return logits_TM[:, 0] - among_T.where(there_TM.any(-1), self.log_normalizer_T)

    def at_temperature(self, temperature: float) -> "VocabularyLogits":
        """Return the logits divided by the temperature."""
        return self if temperature == 1 else replace(self, local_Tv=self.wide_Tv / temperature)

    def of_first(self, number: int) -> "VocabularyLogits":
        """Return the logits of the first ids of the vocabulary; those behind them, its padding, are never predicted."""
        mine = number - self.tp.rank * self.local_Tv.shape[-1]
        if mine >= self.local_Tv.shape[-1]:
            return self
        left_out_v = torch.arange(self.local_Tv.shape[-1], device=self.local_Tv.device) >= mine
        return replace(self, local_Tv=self.wide_Tv.masked_fill(left_out_v, _NEVER))

    def log_probabilities_of_all(self) -> torch.Tensor:
        """Return log p of this rank's columns, [T, v], finite and without a gradient."""
        wide_Tv = self.wide_Tv.detach()
        return (wide_Tv - self.log_normalizer_T.detach().unsqueeze(-1)).clamp_(min=_NEVER)

    def top(self, number: int) -> torch.Tensor:
        """Return the ids with the largest logits, int64 [T, number], the largest first, without a gradient."""
        own = min(number, self.local_Tv.shape[-1])
        logits_TK, ids_TK = self.wide_Tv.detach().topk(own)
        ids_TK = ids_TK + self.tp.rank * self.local_Tv.shape[-1]
        if self.tp.size == 1:
            return ids_TK
        logits_TK, ids_TK = (all_gather(each, 1, self.tp.group) for each in (logits_TK, ids_TK))
        return ids_TK.gather(-1, logits_TK.topk(number).indices)

    def log_rest(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Return the log of the probability of all ids but those of `ids_TK`, [T]; very low where there are none."""
        columns = self.local_Tv.shape[-1]
        local_TK, mine_TK = local_ids(ids_TK, columns, self.tp)
        named_Tv = torch.zeros(len(ids_TK), columns + 1, dtype=torch.bool, device=ids_TK.device)
        named_Tv = named_Tv.scatter_(-1, local_TK.where(mine_TK, columns), True)[:, :columns]  # others' in the last one
        return log_normalizer(self.wide_Tv.masked_fill(named_Tv, _NEVER), self.tp) - self.log_normalizer_T

    def entropy(self) -> torch.Tensor:
        """Return -sum of p log p over the vocabulary, in nats, [T]."""
        return _Entropy.apply(self.wide_Tv, self.log_normalizer_T.detach(), self.tp)

    def _logits_of(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Return the logits of the vocabulary's ids, 0 for what is no id."""
        local_TK, mine_TK = local_ids(ids_TK, self.local_Tv.shape[-1], self.tp)
        own_TK = self.wide_Tv.gather(-1, local_TK).where(mine_TK, 0)
        return own_TK if self.tp.size == 1 else sum_alike(own_TK, self.tp.group)


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
