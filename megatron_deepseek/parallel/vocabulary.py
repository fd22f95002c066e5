"""Vocabulary-parallel embedding and cross-entropy: each TP rank holds V/tp rows, and logits are never gathered.

Shapes: B batch, S sequence, H hidden, T = B*S tokens, V vocabulary, v = V/tp this rank's part of it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

from megatron_deepseek.parallel.tensor import TensorParallel, local_weight, sharded_parameter


class VocabParallelEmbedding(nn.Module):
    """weight [V, H] sharded by rows. Ids outside this rank's rows contribute zero to the sum over TP."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.weight = sharded_parameter((vocab_size, hidden_size), tp.mesh, Shard(0))
        self.tp = tp

    def local_weight(self) -> torch.Tensor:
        """This rank's rows [v, H]; with tied embeddings the output head uses them too."""
        return local_weight(self.weight, Shard(0))

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """-> [B, S, H], or this rank's slice of S under sequence parallelism."""
        weight_vH = self.local_weight()
        if self.tp.size == 1:
            return F.embedding(tokens_BS, weight_vH)
        local_BS, mine_BS = local_ids(tokens_BS, weight_vH.shape[0], self.tp)
        return self.tp.leave(F.embedding(local_BS, weight_vH) * mine_BS.unsqueeze(-1))


def local_ids(ids: torch.Tensor, rows: int, tp: TensorParallel) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each id on this rank (0 where another rank holds it), and whether this rank holds it."""
    local = ids - tp.rank * rows
    mine = (local >= 0) & (local < rows)
    return local.where(mine, 0), mine


class _CrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over a sharded vocabulary: three all-reduces of [T] instead of a gather of [T, V]."""

    @staticmethod
    def forward(ctx, logits_Tv, labels_T, tp):
        wide = torch.promote_types(logits_Tv.dtype, torch.float32)
        max_T = logits_Tv.amax(-1).to(wide)
        if tp.size > 1:
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=tp.group)
        shifted_Tv = logits_Tv.to(wide) - max_T.unsqueeze(-1)
        local_T, mine_T = local_ids(labels_T, logits_Tv.shape[-1], tp)
        label_logit_T = shifted_Tv.gather(-1, local_T.unsqueeze(-1)).squeeze(-1) * mine_T
        exp_Tv = shifted_Tv.exp_()
        sums_2T = torch.stack([exp_Tv.sum(-1), label_logit_T])
        if tp.size > 1:
            dist.all_reduce(sums_2T, group=tp.group)
        sum_T, label_logit_T = sums_2T
        ctx.save_for_backward(exp_Tv, sum_T, local_T, mine_T)
        ctx.logits_dtype = logits_Tv.dtype
        return sum_T.log() - label_logit_T

    @staticmethod
    def backward(ctx, grad_T):
        exp_Tv, sum_T, local_T, mine_T = ctx.saved_tensors
        grad_Tv = exp_Tv * (grad_T / sum_T).unsqueeze(-1)
        grad_Tv.scatter_add_(-1, local_T.unsqueeze(-1), -(grad_T * mine_T).unsqueeze(-1))
        return grad_Tv.to(ctx.logits_dtype), None, None


def vocab_parallel_cross_entropy(logits_Tv: torch.Tensor, labels_T: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Loss of each token [T], in at least float32, from this rank's logits. Labels are ids of the whole vocabulary."""
    if tp.size == 1:
        wide = torch.promote_types(logits_Tv.dtype, torch.float32)
        return F.cross_entropy(logits_Tv.to(wide), labels_T, reduction="none")
    return _CrossEntropy.apply(logits_Tv, labels_T, tp)
