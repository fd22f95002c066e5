"""Auxiliary losses that keep experts evenly used.

  expert level         alpha_1 sum_i f_i P_i, over the sequence (V2 report eq. 23-25; V3 report eq. 17-20)
  device level         the same over groups of experts, f averaged and P summed (V2 eq. 26-28)
  communication level  f counts the tokens that a group receives (V2 eq. 29-31)

f counts choices made from the un-biased scores under the same group limit; it carries no gradient. A sequence's tokens
may lie on several ranks: its counts are summed over them, its P is not, so each rank returns its share of the loss, and
the shares add up to the whole. The mean over sequences is over the global batch. Tokens that are not routed (padding,
MTP positions without a label) are not among a sequence's tokens.

Shapes: B sequences, S tokens of each on this rank, E experts, K top-k, G groups.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.router import Routing, choose_experts


@dataclass(frozen=True)
class BalanceWeights:
    """alpha of each level. `per_sequence` false pools the micro-batch's sequences into one (seq_aux=False)."""

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    per_sequence: bool = True

    @property
    def any(self) -> bool:
        return bool(self.expert or self.device or self.communication)


def balance_loss(routing: Routing, num_sequences: int, config: ModelConfig, weights: BalanceWeights,
                 sequence_group: dist.ProcessGroup | None, routed_BS: torch.Tensor | None = None) -> torch.Tensor:
    """Return this rank's share of the loss, a scalar: the sum over its B = `num_sequences` sequences. One without a
    routed token adds nothing, also where sequences are pooled.

    The caller divides it by the number of the global batch's sequences. `sequence_group`: the ranks among which a
    sequence's tokens are divided, None if this rank has them all; `routed_BS`: which of this rank's tokens are routed,
    None for all.
    """
    num_groups = config.n_group
    scores_BSE = routing.scores_TE.unflatten(0, (num_sequences, -1))
    if config.scoring_func == "sigmoid":
        scores_BSE = scores_BSE / scores_BSE.sum(-1, keepdim=True)
    chosen_BSE = _choices(routing, config).unflatten(0, (num_sequences, -1))
    all_routed = routed_BS is None
    if all_routed:
        routed_BS = chosen_BSE.new_ones(chosen_BSE.shape[:2])
    else:
        scores_BSE, chosen_BSE = (x.masked_fill(~routed_BS.unsqueeze(-1), 0) for x in (scores_BSE, chosen_BSE))
    if not weights.per_sequence:
        if not all_routed:
            num_sequences = _filled_sequences(routed_BS, sequence_group)
        scores_BSE, chosen_BSE, routed_BS = (x.flatten(0, 1).unsqueeze(0) for x in (scores_BSE, chosen_BSE, routed_BS))
    reached_BSG = chosen_BSE.unflatten(-1, (num_groups, -1)).any(-1)

    counts_BE, sent_BG, tokens_B1 = chosen_BSE.sum(1), reached_BSG.sum(1), routed_BS.sum(1, keepdim=True)
    if sequence_group is not None:
        for counts in (counts_BE, sent_BG, tokens_B1):
            dist.all_reduce(counts, group=sequence_group)

    counts_BE, sent_BG, tokens_B1 = (x.to(scores_BSE.dtype) for x in (counts_BE, sent_BG, tokens_B1.clamp(min=1)))
    pooled = 1 if weights.per_sequence else num_sequences  # is in the factors, which are kept for the backward anyway
    f_BE = pooled * counts_BE * config.n_routed_experts / (config.num_experts_per_tok * tokens_B1)
    p_BE = scores_BSE.sum(1) / tokens_B1
    p_BG = p_BE.unflatten(-1, (num_groups, -1)).sum(-1)
    f_device_BG = f_BE.unflatten(-1, (num_groups, -1)).mean(-1)
    f_communication_BG = pooled * sent_BG * num_groups / (config.topk_group * tokens_B1)

    loss = weights.expert * (f_BE * p_BE).sum()
    loss = loss + weights.device * (f_device_BG * p_BG).sum()
    return loss + weights.communication * (f_communication_BG * p_BG).sum()


def _filled_sequences(routed_BS: torch.Tensor, sequence_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return how many of the sequences have a routed token, on whichever rank it is."""
    tokens_B = routed_BS.sum(1)
    if sequence_group is not None:
        dist.all_reduce(tokens_B, group=sequence_group)
    return (tokens_B > 0).sum()


@torch.no_grad()
def _choices(routing: Routing, config: ModelConfig) -> torch.Tensor:
    """Return which experts each token would choose without the bias, [T, E] bool."""
    experts_TK = choose_experts(routing.scores_TE, None, config) if config.topk_method == "noaux_tc" \
        else routing.experts_TK
    return torch.zeros_like(routing.scores_TE, dtype=torch.bool).scatter_(-1, experts_TK, True)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_ones((), dtype=ctx.loss_dtype)


def attach_loss(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Return x unchanged; when its gradient arrives, back-propagate `loss` (a term of the global loss) as well.

    So a loss computed in the middle of the pipeline need not be sent to the last stage.
    """
    return _AttachLoss.apply(x, loss)
