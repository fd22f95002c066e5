"""Expert capacity: how many tokens of one sequence an expert takes. Tokens above it are dropped by that expert: they go
on with their other experts, the shared ones and the residual stream.

Capacity is counted in each sequence by itself, over all the ranks that share it. So what is dropped depends on the
sequence alone, not on how the batch was divided: micro-batches, data, tensor, context and expert ranks give the same
gradient. (Megatron-LM counts the tokens that happen to be on one rank, where another layout drops other tokens.)

Shapes: B sequences, S tokens of each on this rank, K top-k, N = S*K copies of the whole sequence.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.collectives import all_gather
from megatron_deepseek.parallel.expert import DROPPED


@dataclass(frozen=True)
class Capacity:
    """Limits an expert to ceil(factor * routed tokens * K / num_experts), `factor` times an even share of the copies.

    `policy` says which copies an expert keeps. "probs": those with the largest weights, the first of equal ones (to 11
    bits). "position": the first of the sequence, so that what is kept of a token does not depend on later ones.
    """

    factor: float
    policy: str
    num_experts: int

    @torch.no_grad()
    def keep(self, experts_BSK: torch.Tensor, weights_BSK: torch.Tensor, positions_S: torch.Tensor,
             sequence_group: dist.ProcessGroup | None) -> torch.Tensor:
        """Return `experts_BSK` with DROPPED in place of the choices above the capacity.

        `positions_S`: the positions of this rank's tokens; `sequence_group`: the ranks that share each sequence, None
        if this rank has all of it.
        """
        own, rank, size = experts_BSK, 0, 1
        if sequence_group is not None:
            rank, size = sequence_group.rank(), sequence_group.size()
            experts_BSK, weights_BSK = (all_gather(x, 1, sequence_group) for x in (experts_BSK, weights_BSK.detach()))
            positions_S = all_gather(positions_S, 0, sequence_group)
        order_BN = self._order(weights_BSK, positions_S)
        place_BSK = place_in_expert(experts_BSK.flatten(1), order_BN).view_as(experts_BSK)
        tokens_B = (experts_BSK != DROPPED).any(-1).sum(1)
        limit_B = (tokens_B.double() * (self.factor * experts_BSK.shape[2] / self.num_experts)).ceil()
        kept_BSK = place_BSK < limit_B.view(-1, 1, 1)
        return own.where(kept_BSK.chunk(size, 1)[rank], DROPPED)

    def _order(self, weights_BSK: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
        """Return the copies of each sequence from the one to be kept first.

        Weights are compared to 11 bits: equal tokens, which are common in packed documents, get weights that differ by
        rounding alone, and differently in each layout.
        """
        num_copies = weights_BSK.shape[2]
        order_BN = positions_S.repeat_interleave(num_copies).argsort(stable=True).repeat(len(weights_BSK), 1)
        if self.policy == "position":
            return order_BN
        weights_BN = weights_BSK.flatten(1).half()
        return order_BN.gather(1, weights_BN.gather(1, order_BN).argsort(dim=1, descending=True, stable=True))


def place_in_expert(experts_BN: torch.Tensor, order_BN: torch.Tensor) -> torch.Tensor:
    """Return how many copies of the same expert come before each one, when they are taken in `order_BN`."""
    order_BN = order_BN.gather(1, experts_BN.gather(1, order_BN).argsort(dim=1, stable=True))
    sorted_BN = experts_BN.gather(1, order_BN)
    first_BN = torch.searchsorted(sorted_BN, sorted_BN)
    places_N = torch.arange(experts_BN.shape[1], device=experts_BN.device)
    return torch.empty_like(experts_BN).scatter_(1, order_BN, places_N - first_BN)
