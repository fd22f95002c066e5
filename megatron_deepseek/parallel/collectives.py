"""Collectives whose gradients are collectives: what goes out one way in the forward comes home the other way.

    all-gather      / backward reduce-scatter      every rank makes its own use of the whole
    reduce-scatter  / backward all-gather          each rank owns a slice of a sum
    identity        / backward all-reduce          every rank makes its own use of what all have
    all-reduce      / backward identity            all ranks compute the same from a sum
    slice           / backward all-gather          and the other way round
"""

import torch
import torch.distributed as dist

from megatron_deepseek.ops.fp8.block_scaled import map_rows
from megatron_deepseek.parallel.nodes import Sent, uncounted

# torch 2.13 renamed these collectives and warns of the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate every rank's equally shaped `x` along `dim`, in rank order."""
    x_first = x.movedim(dim, 0).contiguous()
    out = x_first.new_empty(group.size() * x_first.shape[0], *x_first.shape[1:])
    _all_gather_single(out, x_first, group=group)
    return out.movedim(0, dim).contiguous()


def reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum `x` over the ranks and keep this rank's equal slice along `dim`."""
    x_first = x.movedim(dim, 0).contiguous()
    assert x_first.shape[0] % group.size() == 0, (x.shape, dim, group.size())
    out = x_first.new_empty(x_first.shape[0] // group.size(), *x_first.shape[1:])
    _reduce_scatter_single(out, x_first, group=group)
    return out.movedim(0, dim).contiguous()


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of every rank's `x`, in a new tensor."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


class GatherSum(torch.autograd.Function):
    """All-gather; every rank uses the whole result, so the gradients are summed and scattered."""

    @staticmethod
    def forward(ctx, x, dim, group, sent):
        ctx.dim, ctx.group, ctx.sent = dim, group, sent
        sent(group, x)
        return map_rows(x, lambda part: all_gather(part, dim, group))

    @staticmethod
    def backward(ctx, grad):
        own = reduce_scatter(grad, ctx.dim, ctx.group)
        ctx.sent(ctx.group, own)
        return own, None, None, None


class ScatterSum(torch.autograd.Function):
    """Reduce-scatter of partial sums; each rank owns a slice, so the gradients are gathered."""

    @staticmethod
    def forward(ctx, x, dim, group, sent):
        ctx.dim, ctx.group, ctx.sent = dim, group, sent
        own = reduce_scatter(x, dim, group)
        sent(group, own)
        return own

    @staticmethod
    def backward(ctx, grad):
        ctx.sent(ctx.group, grad)
        return all_gather(grad, ctx.dim, ctx.group), None, None, None


def gather_sum(x: torch.Tensor, dim: int, group: dist.ProcessGroup, sent: Sent = uncounted) -> torch.Tensor:
    """Gather `x` as `all_gather`, and sum and scatter its gradients: every rank makes its own use of the whole.

    `sent` is told, both ways, what this rank sends to each of the others.
    """
    return GatherSum.apply(x, dim, group, sent)


def scatter_sum(x: torch.Tensor, dim: int, group: dist.ProcessGroup, sent: Sent = uncounted) -> torch.Tensor:
    """Sum and scatter `x`, partial sums, as `reduce_scatter`; its gradients are gathered."""
    return ScatterSum.apply(x, dim, group, sent)


class CopyToTensorRanks(torch.autograd.Function):
    """The identity into a sharded region; each rank's gradient is a partial sum."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


class SumOverTensorRanks(torch.autograd.Function):
    """All-reduce of partial sums; the result is replicated, and so is its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_gradients(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `x` itself, the same on all ranks; sum its gradients, since every rank makes its own use of it."""
    return CopyToTensorRanks.apply(x, group)


def sum_alike(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of every rank's `x`. All ranks compute the same from it, so its gradient is each one's own."""
    return SumOverTensorRanks.apply(x, group)


class SplitTokens(torch.autograd.Function):
    """Take this rank's slice of a replicated tensor; the whole gradient is gathered from the slices' gradients."""

    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return x.chunk(group.size(), dim)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.dim, ctx.group), None, None


class JoinTokens(torch.autograd.Function):
    """Gather slices into a replicated tensor; the gradient is replicated, so each rank takes its own slice."""

    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()].contiguous(), None, None
