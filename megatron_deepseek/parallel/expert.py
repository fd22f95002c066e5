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

from megatron_deepseek.device import send, start_read
from megatron_deepseek.ops.copies import SortedChoices, copy_keys, copy_rows, sort_choices, sum_copies
from megatron_deepseek.ops.fp8.block_scaled import map_rows
from megatron_deepseek.ops.permute import invert, permute
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.nodes import CommunicationCounter

DROPPED = -1  # in place of an expert
Experts = Callable[[torch.Tensor, list[list[int]], torch.Tensor | None], torch.Tensor]
ShareCounts = Callable[[torch.Tensor], torch.Tensor]  # ExpertTensorParallel.counts
Encode = Callable[[torch.Tensor], torch.Tensor]


class Dispatcher(Protocol):
    """Carries tokens to the ranks of their experts and the results back.

    `mesh` is that of the expert ranks, over which the experts' weights are sharded. `to_experts` converts the gradients
    of the experts' results before they are sent. Tokens are sent in the format in which they come: block-scaled ones
    (ops/fp8/block_scaled.py) as FP8. `counter` counts what is sent.
    """

    mesh: DeviceMesh
    counter: CommunicationCounter

    def route(self, experts_TK: torch.Tensor) -> "Route":
        """Find out where copies of tokens go that chose `experts_TK`, DROPPED for none.

        The counts are agreed on by the ranks, on the device, and begin their way to the host: the one thing in a layer
        that the host has to wait for. Work that is queued before the route is taken is computed meanwhile.
        """

    def __call__(self, x_TH: torch.Tensor, route: "Route", weights_TK: torch.Tensor, experts: Experts,
                 keys_T: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """Return each token's sum over k of weights_TK times its k-th expert, [T, H] in x's dtype, and the cross-node
        sends: how often this rank sent a token, or a copy of one, to another node for it. A choice of DROPPED adds
        nothing.

        `experts(rows, counts_se, keys)` maps rows sorted by local expert to rows of the same shape. counts_se are the
        counts of each expert's rows, of every rank of this one's expert-tensor-parallel group
        (`ExpertTensorParallel.counts`). `keys` are those of the rows' tokens, int64, which travel beside them, or None
        where there are none.
        """


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def not_shared(counts_e: torch.Tensor) -> torch.Tensor:
    """Return `counts_e` as those of a group of one rank, [1, e]."""
    return counts_e.unsqueeze(0)


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


@dataclass(frozen=True, eq=False)
class Route:
    """Where the copies of this rank's tokens go first, and the counts that are on their way to the host.

    `read` waits for these and returns a nested list of each tensor that the dispatcher's `route` gave it. `experts_TK`
    are for the dispatcher that sends the choices on.
    """

    choices: SortedChoices
    read: Callable[[], list[list]]
    experts_TK: torch.Tensor | None = None


@dataclass(frozen=True)
class RowCounts:
    """How many rows a group exchanges for its experts, on the host.

    outgoing_E: this rank's rows for each expert of the group. incoming_re: the rows from each rank for each local
    expert. shared_se: the rows of each rank of the expert-tensor-parallel group for each local expert.
    """

    outgoing_E: list[int]
    incoming_re: list[list[int]]
    shared_se: list[list[int]]


class AllToAllRows(torch.autograd.Function):
    """All-to-all, which is its own transpose: the gradient of a row goes back to where the row came from."""

    @staticmethod
    def forward(ctx, x, sent, received, exchange, encode):
        ctx.sent, ctx.received, ctx.exchange, ctx.encode = sent, received, exchange, encode
        return exchange.send(x, sent, received)

    @staticmethod
    def backward(ctx, grad):
        return ctx.exchange.send(ctx.encode(grad), ctx.received, ctx.sent), None, None, None, None


def agree_on_counts(outgoing_E: torch.Tensor, exchange: Exchange, shared: ShareCounts) -> tuple[torch.Tensor, ...]:
    """Return the tensors of RowCounts, on the device."""
    incoming_re = exchange.counts(outgoing_E)
    return outgoing_E, incoming_re, shared(incoming_re.sum(0))


def run_experts(make_rows: Callable[[], torch.Tensor], device: torch.device, counts: RowCounts, experts: Experts,
                exchange: Exchange, to_experts: Encode = unchanged, keys_R: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, int]:
    """Send rows, sorted by the group's experts, to their experts' ranks and return the results in the same order, and
    how many of the rows were sent to other nodes. Keys are sent with their rows.

    `make_rows` returns the rows [R, H], on `device`. Nobody holds them, or those that arrive, longer than the next
    function needs: they are not there while experts compute.
    """
    local = len(counts.outgoing_E) // exchange.group.size()
    sent = [sum(counts.outgoing_E[start:start + local]) for start in range(0, len(counts.outgoing_E), local)]
    received = [sum(of_rank) for of_rank in counts.incoming_re]
    order_Q = _group_by_expert(send(counts.incoming_re, device), sum(received))
    inverse_Q = invert(order_Q)
    keys_Q = None if keys_R is None else exchange(keys_R, sent, received)[order_Q]

    def results():
        return experts(permute(exchange(make_rows(), sent, received), order_Q, inverse_Q), counts.shared_se, keys_Q)

    back = exchange(permute(results(), inverse_Q, order_Q), received, sent, to_experts)
    return back, exchange.cross_node_sends(sent)


@dataclass(frozen=True, eq=False)
class AllToAllDispatcher:
    """Sends every copy straight to its expert's rank (GShard, arXiv 2006.16668)."""

    mesh: DeviceMesh
    num_experts: int
    counter: CommunicationCounter
    overlap: MicroBatchOverlap
    to_experts: Encode = unchanged
    shared: ShareCounts = not_shared

    def route(self, experts_TK: torch.Tensor) -> Route:
        choices = sort_choices(experts_TK, self.num_experts)
        if self.mesh.size() == 1:
            return Route(choices, start_read(choices.counts, self.shared(choices.counts)))
        return Route(choices, start_read(*agree_on_counts(choices.counts, self._exchange, self.shared)))

    def __call__(self, x_TH: torch.Tensor, route: Route, weights_TK: torch.Tensor, experts: Experts,
                 keys_T: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        counts_E, *others = route.read()
        copies = route.choices.cut(counts_E)
        keys_R, cross_node_sends = copy_keys(keys_T, copies), 0
        if self.mesh.size() == 1:
            rows_RH = experts(copy_rows(x_TH, copies), *others, keys_R)
        else:
            rows_RH, cross_node_sends = run_experts(
                lambda: copy_rows(x_TH, copies), x_TH.device, RowCounts(counts_E, *others), experts, self._exchange,
                self.to_experts, keys_R)
        return sum_copies(rows_RH, weights_TK, copies), cross_node_sends

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.mesh.get_group(), self.overlap, self.counter)


def _group_by_expert(counts_re: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the order that turns `num_rows` rows grouped by (source rank r, expert e) into rows grouped by (e, r)."""
    num_ranks, num_experts = counts_re.shape
    expert_of_row = torch.arange(num_experts, device=counts_re.device).repeat(num_ranks)
    return expert_of_row.repeat_interleave(counts_re.flatten(), output_size=num_rows).argsort(stable=True)
