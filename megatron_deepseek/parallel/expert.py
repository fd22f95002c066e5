"""Expert parallelism: bring each token's copies to the ranks that hold their experts, and the results back.

    tokens x [T, H], chosen experts [T, K]
      sort copies by expert            rows are grouped by destination rank, since rank r holds experts r*e .. r*e+e-1
      exchange counts, all-to-all      rows arrive grouped by source rank, within it by local expert
      regroup by local expert          what the grouped GEMM wants
      experts
      regroup, all-to-all, weigh and add copies

Gradients run the same road backwards: all-to-all is its own transpose with the split sizes exchanged. expert_gather.py
and expert_grouped.py take other roads to the same sums.
Shapes: T tokens, K top-k, R = T*K rows sent, Q rows received, E experts, e = E/ep local experts, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.ops.block_scaled import map_rows
from megatron_deepseek.ops.copies import copy_rows, sort_copies, sum_copies
from megatron_deepseek.ops.permute import invert, permute
from megatron_deepseek.parallel.nodes import NodeMap, Traffic, bytes_of
from megatron_deepseek.parallel.turns import Turns

NOBODY = -1  # in place of an expert
Experts = Callable[[torch.Tensor, list[int]], tuple[torch.Tensor, Traffic]]
Encode = Callable[[torch.Tensor], torch.Tensor]


class Dispatcher(Protocol):
    """`mesh` is that of the expert ranks, over which the experts' weights are sharded.

    `to_experts` makes what travels of the gradients of the experts' results. What tokens travel as is what they come
    as: block-scaled ones (ops/block_scaled.py) as FP8.
    """

    mesh: DeviceMesh

    def __call__(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, experts: Experts
                 ) -> tuple[torch.Tensor, Traffic]:
        """[T, H]: sum over k of weights_TK times expert experts_TK of each token, in x's dtype, and what this rank
        sent for it in the forward; the backward sends as much again. A choice of NOBODY has no part in it.

        `experts(rows, counts)` maps rows sorted by local expert, `counts` of each, to rows of the same shape, and says
        what it sent itself.
        """


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sent, received, group, turns, encode):
        ctx.sent, ctx.received, ctx.group, ctx.turns, ctx.encode = sent, received, group, turns, encode
        return _all_to_all(x, sent, received, group, turns)

    @staticmethod
    def backward(ctx, grad):
        grad = _all_to_all(ctx.encode(grad), ctx.received, ctx.sent, ctx.group, ctx.turns)
        return grad, None, None, None, None, None


def _all_to_all(x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, turns: Turns
                ) -> torch.Tensor:
    """Of every part of x, if it is block-scaled."""
    def exchange(part):
        out = part.new_empty(sum(received), *part.shape[1:])
        turns.wait(dist.all_to_all_single(out, part.contiguous(), received, sent, group=group, async_op=True))
        return out

    return map_rows(x, exchange)


def exchange_rows(x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, turns: Turns,
                  encode: Encode = unchanged) -> torch.Tensor:
    """All-to-all of the first dimension: `sent[r]` rows to rank r, `received[r]` rows from it.

    `encode` makes of the gradient what travels back.
    """
    return x if group.size() == 1 else _AllToAll.apply(x, sent, received, group, turns, encode)


def exchange_counts(counts_E: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[ranks, E/ranks]: how many rows for each of this rank's bins come from each rank; `counts_E` go out."""
    incoming_E = torch.empty_like(counts_E)
    if group.size() == 1:
        incoming_E.copy_(counts_E)
    else:
        dist.all_to_all_single(incoming_E, counts_E, group=group)
    return incoming_E.view(group.size(), -1)


def run_experts(rows_RH: torch.Tensor, counts: list[int], experts: Experts, nodes: NodeMap, turns: Turns,
                to_experts: Encode = unchanged) -> tuple[torch.Tensor, Traffic]:
    """Rows sorted by expert of the group, `counts` of each, to their experts' ranks and back in the same order."""
    group = nodes.group
    counts_E = torch.tensor(counts, device=rows_RH.device)
    incoming_re = exchange_counts(counts_E, group)
    sent, received = counts_E.view(group.size(), -1).sum(1).tolist(), incoming_re.sum(1).tolist()
    rows_QH = exchange_rows(rows_RH, sent, received, group, turns)
    order_Q = _group_by_expert(incoming_re)
    inverse_Q = invert(order_Q)
    results_QH, traffic = experts(permute(rows_QH, order_Q, inverse_Q), incoming_re.sum(0).tolist())
    results_QH = permute(results_QH, inverse_Q, order_Q)
    traffic += nodes.dispatched(sent, rows_QH) + nodes.traffic(bytes_of(received, results_QH))
    return exchange_rows(results_QH, received, sent, group, turns, to_experts), traffic


@dataclass(frozen=True, eq=False)
class AllToAllDispatcher:
    """Every copy travels straight to its expert's rank (GShard, arXiv 2006.16668)."""

    mesh: DeviceMesh
    num_experts: int
    ranks_per_node: int
    turns: Turns
    to_experts: Encode = unchanged

    def __call__(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, experts: Experts
                 ) -> tuple[torch.Tensor, Traffic]:
        copies = sort_copies(experts_TK, self.num_experts)
        rows_RH = copy_rows(x_TH, copies)
        if self.mesh.size() == 1:
            rows_RH, traffic = experts(rows_RH, copies.counts)
        else:
            nodes = NodeMap(self.mesh.get_group(), self.ranks_per_node)
            rows_RH, traffic = run_experts(rows_RH, copies.counts, experts, nodes, self.turns, self.to_experts)
        return sum_copies(rows_RH, weights_TK, copies), traffic


def _group_by_expert(counts_re: torch.Tensor) -> torch.Tensor:
    """Order that turns rows grouped by (source rank r, expert e) into rows grouped by (e, r)."""
    num_ranks, num_experts = counts_re.shape
    expert_of_row = torch.arange(num_experts, device=counts_re.device).repeat(num_ranks)
    return expert_of_row.repeat_interleave(counts_re.flatten()).argsort(stable=True)
