"""The `allgather` dispatcher: every expert rank gets every token, and serves the copies of its own experts.

One all-gather and one reduce-scatter of whole tokens, no sizes to agree on beforehand. A token travels to ep - 1 ranks
instead of at most K: for small expert groups, or where K is close to ep.
Shapes: T tokens of this rank, G = ep*T of the group, K top-k, H hidden.
"""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.ops.copies import copy_rows, sort_copies, sum_copies
from megatron_deepseek.parallel.expert import Encode, Experts, unchanged
from megatron_deepseek.parallel.nodes import NodeMap, Traffic, bytes_of
from megatron_deepseek.parallel.tensor import all_gather, gather_sum, scatter_sum


@dataclass(frozen=True, eq=False)
class AllGatherDispatcher:
    """Each rank's tokens are as many: micro-batches and slices of sequences are equal."""

    mesh: DeviceMesh
    num_experts: int
    ranks_per_node: int
    to_experts: Encode = unchanged  # its gradients travel before they are weighed, as whole tokens: not as FP8

    def __call__(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, experts: Experts
                 ) -> tuple[torch.Tensor, Traffic]:
        size, mine = self.mesh.size(), self.num_experts // self.mesh.size()
        if size == 1:
            return self._serve(x_TH, experts_TK, weights_TK, experts, mine)
        group = self.mesh.get_group()
        x_GH, weights_GK = gather_sum(x_TH, 0, group), gather_sum(weights_TK, 0, group)
        experts_GK = all_gather(experts_TK, 0, group) - self.mesh.get_local_rank() * mine
        y_GH, traffic = self._serve(x_GH, experts_GK, weights_GK, experts, mine)
        y_TH = scatter_sum(y_GH, 0, group)
        rows = [x_TH.shape[0]] * size
        nodes = NodeMap(group, self.ranks_per_node)
        traffic += nodes.dispatched(rows, x_TH, weights_TK, experts_TK) + nodes.traffic(bytes_of(rows, y_TH))
        return y_TH, traffic

    def _serve(self, x_GH, experts_GK, weights_GK, experts: Experts, num_bins: int
               ) -> tuple[torch.Tensor, Traffic]:
        """The part of each token's sum that experts 0..num_bins-1 make."""
        copies = sort_copies(experts_GK, num_bins)
        rows, traffic = experts(copy_rows(x_GH, copies), copies.counts)
        return sum_copies(rows, weights_GK, copies), traffic
