"""Expert parallelism: bring each token's copies to the ranks that hold their experts, and the results back.

    tokens x [T, H], chosen experts [T, K]
      sort copies by expert            rows are grouped by destination rank, since rank r holds experts r*e .. r*e+e-1
      exchange counts, all-to-all      rows arrive grouped by source rank, within it by local expert
      regroup by local expert          what the grouped GEMM wants
      experts
      regroup, all-to-all, weigh and add copies

Gradients run the same road backwards: all-to-all is its own transpose with the split sizes exchanged.
Shapes: T tokens, K top-k, R = T*K rows sent, Q rows received, E experts, e = E/ep local experts, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.ops.permute import copy_and_permute, invert, permute, weighted_sum

Experts = Callable[[torch.Tensor, list[int]], torch.Tensor]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None


@dataclass(frozen=True, eq=False)
class AllToAllDispatcher:
    """Every copy travels straight to its expert's rank (GShard, arXiv 2006.16668). No token is dropped."""

    mesh: DeviceMesh
    num_experts: int

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.mesh.size()

    def __call__(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, experts: Experts
                 ) -> torch.Tensor:
        """-> [T, H]: sum over k of weights_TK times expert experts_TK of each token, in x's dtype.

        `experts(rows, counts)` maps rows sorted by local expert, `counts` of each, to rows of the same shape.
        """
        order_R = experts_TK.flatten().argsort(stable=True)
        inverse_R = invert(order_R)
        counts_E = experts_TK.flatten().bincount(minlength=self.num_experts)
        rows_RH = copy_and_permute(x_TH, order_R, inverse_R)
        rows_RH = self._at_experts(rows_RH, counts_E, experts)
        return weighted_sum(rows_RH, weights_TK, order_R, inverse_R)

    def _at_experts(self, rows_RH: torch.Tensor, counts_E: torch.Tensor, experts: Experts) -> torch.Tensor:
        if self.mesh.size() == 1:
            return experts(rows_RH, counts_E.tolist())
        group, shape = self.mesh.get_group(), (self.mesh.size(), self.num_local_experts)
        incoming_E = torch.empty_like(counts_E)
        dist.all_to_all_single(incoming_E, counts_E, group=group)
        sent, received = counts_E.view(shape).sum(1).tolist(), incoming_E.view(shape).sum(1).tolist()

        rows_QH = _AllToAll.apply(rows_RH, sent, received, group)
        order_Q = _group_by_expert(incoming_E.view(shape))
        inverse_Q = invert(order_Q)
        rows_QH = experts(permute(rows_QH, order_Q, inverse_Q), incoming_E.view(shape).sum(0).tolist())
        rows_QH = permute(rows_QH, inverse_Q, order_Q)
        return _AllToAll.apply(rows_QH, received, sent, group)


def _group_by_expert(counts_re: torch.Tensor) -> torch.Tensor:
    """Order that turns rows grouped by (source rank r, expert e) into rows grouped by (e, r)."""
    num_ranks, num_experts = counts_re.shape
    expert_of_row = torch.arange(num_experts, device=counts_re.device).repeat(num_ranks)
    return expert_of_row.repeat_interleave(counts_re.flatten()).argsort(stable=True)
