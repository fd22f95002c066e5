"""The `allgather` dispatcher: every expert rank gets every token, and serves the copies of its own experts.

It is one all-gather and one reduce-scatter of whole tokens, with no sizes to agree on beforehand. A token is sent to ep
- 1 ranks instead of at most K: for small expert groups, or where K is close to ep.

Shapes: T tokens of this rank, G = ep*T of the group, K top-k, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.device import start_read
from megatron_deepseek.ops.copies import copy_keys, copy_rows, sort_choices, sum_copies
from megatron_deepseek.parallel.collectives import all_gather, gather_sum, scatter_sum
from megatron_deepseek.parallel.expert import Encode, Experts, Route, ShareCounts, not_shared, unchanged
from megatron_deepseek.parallel.nodes import CommunicationCounter


@dataclass(frozen=True, eq=False)
class AllGatherDispatcher:
    """All-gathers tokens over the expert ranks. All have as many: micro-batches and sequence slices are equal."""

    mesh: DeviceMesh
    num_experts: int
    counter: CommunicationCounter
    to_experts: Encode = unchanged  # not used: gradients are sent as whole tokens, before they are weighed, not as FP8
    shared: ShareCounts = not_shared

    def route(self, experts_TK: torch.Tensor) -> Route:
        mine = self.num_experts // self.mesh.size()
        if self.mesh.size() > 1:
            group = self.mesh.get_group()
            self.counter.everyone(group, experts_TK)
            experts_TK = all_gather(experts_TK, 0, group) - self.mesh.get_local_rank() * mine
        choices = sort_choices(experts_TK, mine)
        return Route(choices, start_read(choices.counts, self.shared(choices.counts)))

    def __call__(self, x_TH: torch.Tensor, route: Route, weights_TK: torch.Tensor, experts: Experts,
                 keys_T: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        if self.mesh.size() == 1:
            return _serve(lambda: x_TH, route, weights_TK, experts, keys_T), 0
        group, sent = self.mesh.get_group(), self.counter.everyone
        weights_GK, keys_G = gather_sum(weights_TK, 0, group, sent), None
        if keys_T is not None:
            sent(group, keys_T)
            keys_G = all_gather(keys_T, 0, group)
        y_GH = _serve(lambda: gather_sum(x_TH, 0, group, sent), route, weights_GK, experts, keys_G)
        cross_node_sends = self.counter.divide(group, [len(x_TH)] * self.mesh.size()).across_nodes
        return scatter_sum(y_GH, 0, group, sent), cross_node_sends


def _serve(gather_GH: Callable[[], torch.Tensor], route: Route, weights_GK: torch.Tensor, experts: Experts,
           keys_G: torch.Tensor | None) -> torch.Tensor:
    """Return the part of each token's sum that this rank's experts make. `gather_GH` returns the tokens, which nothing
    holds while experts compute.
    """
    counts_e, counts_se = route.read()
    copies = route.choices.cut(counts_e)
    y_RH = experts(copy_rows(gather_GH(), copies), counts_se, copy_keys(keys_G, copies))
    return sum_copies(y_RH, weights_GK, copies)
