"""Expert parallelism: bring each token's copies to the ranks that hold their experts, and the results back.

    tokens x [T, H], chosen experts [T, K]
      sort copies by expert            rows are grouped by destination rank, since rank r holds experts r*e .. r*e+e-1
      exchange counts, all-to-all      rows arrive grouped by source rank, within it by local expert
      regroup by local expert          the order that the grouped GEMM reads
      experts
      regroup, all-to-all, weigh and add copies

The backward takes the same steps in reverse: all-to-all is its own transpose with the split sizes exchanged.
expert_gather.py and expert_grouped.py compute the same sums with other collectives.

Shapes: T tokens, K top-k, R = T*K rows sent, Q rows received, E experts, e = E/ep local experts, r ranks, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.ops.copies import copy_keys, copy_rows, sort_copies, sum_copies
from megatron_deepseek.ops.fp8.block_scaled import map_rows
from megatron_deepseek.ops.permute import invert, permute
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.nodes import CommunicationCounter

DROPPED = -1  # in place of an expert
Experts = Callable[[torch.Tensor, list[int], torch.Tensor | None], torch.Tensor]
Encode = Callable[[torch.Tensor], torch.Tensor]


class Dispatcher(Protocol):
    """Carries tokens to the ranks of their experts and the results back.

    `mesh` is that of the expert ranks, over which the experts' weights are sharded. `to_experts` converts the gradients
    of the experts' results before they are sent. Tokens are sent in the format in which they come: block-scaled ones
    (ops/fp8/block_scaled.py) as FP8. `counter` counts what is sent.
    """

    mesh: DeviceMesh
    counter: CommunicationCounter

    def __call__(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, experts: Experts,
                 keys_T: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """Return each token's sum over k of weights_TK times expert experts_TK, [T, H] in x's dtype, and the cross-node
        sends: how often this rank sent a token, or a copy of one, to another node for it. A choice of DROPPED adds
        nothing.

        `experts(rows, counts, keys)` maps rows sorted by local expert, `counts` of each, to rows of the same shape;
        `keys` are those of the rows' tokens, int64, which travel beside them, or None where there are none.
        """


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Exchange:
    """All-to-all of rows over `group`. While rows are on their way the other micro-batch of `overlap` computes."""

    group: dist.ProcessGroup
    overlap: MicroBatchOverlap
    counter: CommunicationCounter

    def __call__(self, x: torch.Tensor, sent: list[int], received: list[int], encode: Encode = unchanged
                 ) -> torch.Tensor:
        """Send `sent[r]` rows of x to rank r, return `received[r]` rows from it; gradients go back by `encode`."""
        return x if self.group.size() == 1 else AllToAllRows.apply(x, sent, received, self, encode)

    def send(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Send rows without a gradient: every part of x if it is block-scaled."""
        def exchange(part):
            out = part.new_empty(sum(received), *part.shape[1:])
            self.overlap.wait(dist.all_to_all_single(out, part.contiguous(), received, sent, group=self.group,
                                                     async_op=True))
            return out

        self.counter.rows(self.group, sent, x)
        return map_rows(x, exchange)

    def counts(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Send `counts_E`, rows for each bin; return [ranks, E/ranks], the rows to come for this rank's bins."""
        incoming_E = torch.empty_like(counts_E)
        if self.group.size() == 1:
            incoming_E.copy_(counts_E)
        else:
            dist.all_to_all_single(incoming_E, counts_E, group=self.group)
        return incoming_E.view(self.group.size(), -1)

    def cross_node_sends(self, sent: list[int]) -> int:
        """Return how many of the rows sent go to other nodes."""
        return self.counter.divide(self.group, sent).across_nodes


class AllToAllRows(torch.autograd.Function):
    """All-to-all, which is its own transpose: the gradient of a row goes back to where the row came from."""

    @staticmethod
    def forward(ctx, x, sent, received, exchange, encode):
        ctx.sent, ctx.received, ctx.exchange, ctx.encode = sent, received, exchange, encode
        return exchange.send(x, sent, received)

    @staticmethod
    def backward(ctx, grad):
        return ctx.exchange.send(ctx.encode(grad), ctx.received, ctx.sent), None, None, None, None


def run_experts(rows_RH: torch.Tensor, counts: list[int], experts: Experts, exchange: Exchange,
                to_experts: Encode = unchanged, keys_R: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """Send rows, sorted by the group's experts with `counts` of each, to their experts' ranks and return the results in
    the same order, and how many of the rows were sent to other nodes. Keys are sent with their rows.
    """
    counts_E = torch.tensor(counts, device=rows_RH.device)
    incoming_re = exchange.counts(counts_E)
    sent, received = counts_E.view(exchange.group.size(), -1).sum(1).tolist(), incoming_re.sum(1).tolist()
    rows_QH = exchange(rows_RH, sent, received)
    order_Q = _group_by_expert(incoming_re)
    inverse_Q = invert(order_Q)
    keys_Q = None if keys_R is None else exchange(keys_R, sent, received)[order_Q]
    results_QH = experts(permute(rows_QH, order_Q, inverse_Q), incoming_re.sum(0).tolist(), keys_Q)
    results_QH = permute(results_QH, inverse_Q, order_Q)
    return exchange(results_QH, received, sent, to_experts), exchange.cross_node_sends(sent)


@dataclass(frozen=True, eq=False)
class AllToAllDispatcher:
    """Sends every copy straight to its expert's rank (GShard, arXiv 2006.16668)."""

    mesh: DeviceMesh
    num_experts: int
    counter: CommunicationCounter
    overlap: MicroBatchOverlap
    to_experts: Encode = unchanged

    def __call__(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, experts: Experts,
                 keys_T: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        copies = sort_copies(experts_TK, self.num_experts)
        rows_RH, keys_R, cross_node_sends = copy_rows(x_TH, copies), copy_keys(keys_T, copies), 0
        if self.mesh.size() == 1:
            rows_RH = experts(rows_RH, copies.counts, keys_R)
        else:
            exchange = Exchange(self.mesh.get_group(), self.overlap, self.counter)
            rows_RH, cross_node_sends = run_experts(rows_RH, copies.counts, experts, exchange, self.to_experts, keys_R)
        return sum_copies(rows_RH, weights_TK, copies), cross_node_sends


def _group_by_expert(counts_re: torch.Tensor) -> torch.Tensor:
    """Return the order that turns rows grouped by (source rank r, expert e) into rows grouped by (e, r)."""
    num_ranks, num_experts = counts_re.shape
    expert_of_row = torch.arange(num_experts, device=counts_re.device).repeat(num_ranks)
    return expert_of_row.repeat_interleave(counts_re.flatten()).argsort(stable=True)
