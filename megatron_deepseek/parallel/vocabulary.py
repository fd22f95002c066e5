"""Vocabulary-parallel embedding and cross-entropy: each TP rank holds V/tp rows, and logits are never gathered.

Shapes: B batch, S sequence, H hidden, T = B*S tokens, V vocabulary, v = V/tp this rank's part of it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.ops.cross_entropy import CrossEntropy
from megatron_deepseek.parallel.tensor import TensorParallel, local_weight, sharded_parameter


class VocabParallelEmbedding(nn.Module):
    """The embedding [V, H], sharded by rows. Ids outside this rank's rows contribute zero to the sum over TP."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.weight = sharded_parameter((vocab_size, hidden_size), tp.mesh, Shard(0))
        self.tp = tp

    def local_weight(self) -> torch.Tensor:
        """Return this rank's rows [v, H]; with tied embeddings the output head uses them too."""
        return local_weight(self.weight, Shard(0))

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Return the tokens' embeddings [B, S, H], or this rank's slice of S under sequence parallelism."""
        weight_vH = self.local_weight()
        if self.tp.size == 1:
            return F.embedding(tokens_BS, weight_vH)
        local_BS, mine_BS = local_ids(tokens_BS, weight_vH.shape[0], self.tp)
        return self.tp.leave(F.embedding(local_BS, weight_vH) * mine_BS.unsqueeze(-1))


def local_ids(ids: torch.Tensor, rows: int, tp: TensorParallel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row of each id on this rank (0 where another rank holds it), and whether this rank holds it."""
    local = ids - tp.rank * rows
    mine = (local >= 0) & (local < rows)
    return local.where(mine, 0), mine


def joint_statistics(logits_Tv: torch.Tensor, labels_T: torch.Tensor, tp: TensorParallel, functions: CrossEntropy
                     ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `cross_entropy_statistics` of the whole vocabulary: maximum, sum of exponentials, label's logit.

    All-reduces of [T] over TP replace a gather of [T, V]. One rank has the label's logit, the others add zero.
    """
    own_max_T, sum_T, label_logit_T = functions.statistics(logits_Tv, labels_T, tp.rank * logits_Tv.shape[-1])
    max_T = own_max_T.clone()
    if tp.size > 1:
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=tp.group)
        sums_2T = torch.stack([sum_T * (own_max_T - max_T).exp(), label_logit_T])
        dist.all_reduce(sums_2T, group=tp.group)
        sum_T, label_logit_T = sums_2T
    return max_T, sum_T, label_logit_T


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over a sharded vocabulary.

    The backward needs no collective: a rank's gradient depends on its own logits and the joint statistics only. The
    logits are saved as they are; their exponentials are computed again in the backward.
    """

    @staticmethod
    def forward(ctx, logits_Tv, labels_T, tp, functions):
        ctx.first_id = tp.rank * logits_Tv.shape[-1]
        ctx.functions = functions
        max_T, sum_T, label_logit_T = joint_statistics(logits_Tv, labels_T, tp, functions)
        ctx.save_for_backward(logits_Tv, labels_T, max_T, sum_T)
        return sum_T.log() - (label_logit_T - max_T)

    @staticmethod
    def backward(ctx, grad_T):
        logits_Tv, labels_T, max_T, sum_T = ctx.saved_tensors
        grad_Tv = ctx.functions.gradient(logits_Tv, labels_T, ctx.first_id, max_T, sum_T, grad_T)
        return grad_Tv, None, None, None


def vocab_parallel_cross_entropy(logits_Tv: torch.Tensor, labels_T: torch.Tensor, tp: TensorParallel,
                                 functions: CrossEntropy = CrossEntropy()) -> torch.Tensor:
    """Return each token's loss [T], in at least float32, from this rank's logits and labels of the whole vocabulary."""
    if functions.plain and tp.size == 1 and not on_accelerator(logits_Tv):
        wide = torch.promote_types(logits_Tv.dtype, torch.float32)
        return F.cross_entropy(logits_Tv.to(wide), labels_T, reduction="none")
    return VocabParallelCrossEntropy.apply(logits_Tv, labels_T, tp, functions)


def log_normalizer(logits_Tv: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Return the log of the sum of exp(logit) over the whole vocabulary, [T], from this rank's wide logits."""
    no_label_T = torch.full_like(logits_Tv[:, 0], -1, dtype=torch.int64)  # no rank has it, so its logit counts as 0
    return VocabParallelCrossEntropy.apply(logits_Tv, no_label_T, tp, CrossEntropy())
