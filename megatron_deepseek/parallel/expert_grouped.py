"""The `grouped` dispatcher: a two-level all-to-all that sends a token once to each destination node.

    across   a token goes once to every node that has one of its experts, to the rank with its own place on that node;
             with it go the experts it chose on that node, and their weights
    within   that rank sends copies to the experts of its node, and adds up their weighted results
    across   one partial sum for each node comes back; the token's rank adds them up

With node-limited routing to M nodes (arXiv 2412.19437, section 2.1.2) a token is sent to at most M nodes, instead of K
times; experts are numbered so that a routing group lies on one node where the number of groups is a multiple of the
nodes'.

Shapes: T tokens, K top-k, N nodes, R rows sent (token, node), Q rows received, E experts, n = E/N of a node, H hidden.
"""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.device import start_read
from megatron_deepseek.ops.copies import Copies, SortedChoices, copy_keys, copy_rows, sort_choices, sum_copies
from megatron_deepseek.ops.permute import count_choices
from megatron_deepseek.parallel.expert import (
    DROPPED,
    Encode,
    Exchange,
    Experts,
    Route,
    RowCounts,
    ShareCounts,
    agree_on_counts,
    not_shared,
    run_experts,
    unchanged,
)
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.nodes import CommunicationCounter, TwoLevels


@dataclass(frozen=True, eq=False)
class GroupedDispatcher:
    """Dispatches over nodes first: `levels` divides the ranks of `mesh`, the expert ranks, into nodes."""

    mesh: DeviceMesh
    num_experts: int
    counter: CommunicationCounter
    overlap: MicroBatchOverlap
    levels: TwoLevels
    to_experts: Encode = unchanged

    shared: ShareCounts = not_shared

    def route(self, experts_TK: torch.Tensor) -> Route:
        """Find out where copies go on both levels: with the tokens for a node, their ranks tell it how many copies each
        of its experts gets, so that the node knows what it will send inside before the tokens come.
        """
        choices = self._one_for_each_node(experts_TK)
        copies_E = count_choices(experts_TK + 1, self.num_experts + 1)[1:]  # DROPPED is -1
        outgoing_Nn = torch.cat([choices.counts.unsqueeze(1), copies_E.view(len(choices.counts), -1)], 1)
        incoming_Nn = self._across.counts(outgoing_Nn.flatten())
        rows_N, copies_n = incoming_Nn[:, 0], incoming_Nn[:, 1:].sum(0)
        inside = agree_on_counts(copies_n, self._within, self.shared)
        return Route(choices, start_read(choices.counts, rows_N, *inside), experts_TK)

    def __call__(self, x_TH: torch.Tensor, route: Route, weights_TK: torch.Tensor, experts: Experts,
                 keys_T: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        counts_N, received, *inside = route.read()
        copies, across = route.choices.cut(counts_N), self._across
        parts = (weights_TK[copies.row_R], route.experts_TK[copies.row_R], copy_keys(keys_T, copies))
        weights_QK, experts_QK, keys_Q = (None if each is None else across(each, counts_N, received) for each in parts)
        within, counts = self._within_node(experts_QK, inside[0]), RowCounts(*inside)

        def make_rows():  # nobody holds what crosses nodes either
            return copy_rows(across(copy_rows(x_TH, copies), counts_N, received), within)

        y_RH, _ = run_experts(make_rows, x_TH.device, counts, experts, self._within, self.to_experts,
                              copy_keys(keys_Q, within))
        y_RH = across(sum_copies(y_RH, weights_QK, within), received, counts_N)
        ones = torch.ones_like(copies.place_QK, dtype=y_RH.dtype)
        return sum_copies(y_RH, ones, copies), across.cross_node_sends(counts_N)

    @property
    def _across(self) -> Exchange:
        return Exchange(self.levels.across.get_group(), self.overlap, self.counter)

    @property
    def _within(self) -> Exchange:
        return Exchange(self.levels.within.get_group(), self.overlap, self.counter)

    def _one_for_each_node(self, experts_TK: torch.Tensor) -> SortedChoices:
        """Return a copy of each token for every node that it needs, sorted by node: `choice_R` is the node."""
        num_nodes = self.levels.across.size()
        node_TK = (experts_TK // (self.num_experts // num_nodes)).where(experts_TK != DROPPED, num_nodes)
        needed_TN = torch.zeros(len(experts_TK), num_nodes + 1, dtype=torch.bool, device=experts_TK.device)
        needed_TN.scatter_(1, node_TK, True)
        nodes_N = torch.arange(num_nodes, device=experts_TK.device)
        return sort_choices(nodes_N.where(needed_TN[:, :num_nodes], DROPPED), num_nodes)

    def _within_node(self, experts_QK: torch.Tensor, outgoing_E: list[int]) -> Copies:
        """Return the copies of rows that came to this node for its experts."""
        number = self.num_experts // self.levels.across.size()
        return sort_choices(experts_QK - self.levels.across.get_local_rank() * number, number).cut(outgoing_E)
