"""Mistakes as they are made, each by replacing what is right in this process, and a case that must show it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from cases import Case
from job import Record, run_case
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import Replicate, Shard

from megatron_deepseek.model import balance_loss, build, capacity, moe, shifts, step
from megatron_deepseek.model.capacity import Capacity
from megatron_deepseek.model.router import Router
from megatron_deepseek.ops import attention, documents
from megatron_deepseek.ops import copies as copies_
from megatron_deepseek.parallel import (
    block_mask,
    blockwise_attention,
    collectives,
    context,
    exchange,
    expert,
    expert_grouped,
    expert_tensor,
    pipeline,
    sequence_sums,
    tensor,
    vocabulary,
    vocabulary_logits,
    zero_bubble,
)
from megatron_deepseek.parallel.data import shard_over_data
from megatron_deepseek.parallel.shared import SharedParameter
from megatron_deepseek.parallel.stage import ReducingStage
from megatron_deepseek.parallel.zero_bubble import DeferredGradients
from megatron_deepseek.training import balance, division, optimizer, scoring, trainer

TP = Case(tp=2, shared=2)
SP = Case(tp=2, shared=2, sp=True)
DP = Case(dp=2, microbatches=2)
EP = Case(dp=2, ep=2)
PP_MTP = Case(pp=2, schedule="1F1B", microbatches=2, mtp=1)
PP_DP = Case(pp=2, dp=2, schedule="1F1B", microbatches=2)
V_TIED = Case(pp=2, schedule="ZBVZeroBubble", virtual=2, microbatches=2, tied=True)
CP = Case(cp=2, mtp=1, microbatches=3)
CP_GATHER = Case(cp=2, cp_type="allgather")
PACKED = Case(cp=2, mtp=2, microbatches=3, packed=True)
PACKED_DP = Case(dp=2, microbatches=2, packed=True)
CP_BALANCE = Case(cp=2, router="group_limited")
GATHER = Case(dp=2, ep=2, dispatcher="allgather")
GROUPED = Case(dp=4, ep=4, dispatcher="grouped", node=2)
DROPPED_LEAF = Case(pp=2, schedule="InterleavedZeroBubble", virtual=2, microbatches=4, recompute="full")
SOFTMAX_TP = Case(tp=2, router="group_limited")
SLICED = Case(dp=2, etp=2)
CP_SAMPLES = Case(cp=2, packed=True, mtp=1, microbatches=3, objective="samples")
TP_DISTILLED = Case(tp=2, sp=True, objective="distillation")
CP_PAIRS = Case(cp=2, micro_batch_size=2, microbatches=2, objective="pairs")
LIMITED = Case(tp=2, mtp=1, capacity="probs", padded=True, microbatches=4)


class Mutation:
    """Each of `changes` replaces something for the rest of the process; `case` is what must differ then."""

    def __init__(self, case: Case, *changes: Callable[[], None]):
        self.case, self.changes = case, changes


def _replace(owner, name: str, value) -> Callable[[], None]:
    assert hasattr(owner, name), f"{owner} has no {name} to replace"
    return partial(setattr, owner, name, value)


def _method(owner: type, name: str, function: Callable) -> Callable[[], None]:
    return _replace(owner, name, staticmethod(function))


def _no_all_reduce(module) -> Callable[[], None]:
    """The module's own all-reduces do nothing."""
    return _replace(module, "dist", SimpleNamespace(**vars(dist) | {"all_reduce": lambda *args, **kwargs: None}))


def _own_part(x: torch.Tensor, dim: int, group, sent=None) -> torch.Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


def _only_own_part(x: torch.Tensor, dim: int, group) -> torch.Tensor:
    """What a gather gives if the other ranks' parts never come."""
    parts = [torch.zeros_like(x) for _ in range(group.size())]
    parts[group.rank()] = x
    return torch.cat(parts, dim)


def _sum_forward(ctx, x, group):
    ctx.group = group
    return collectives.all_reduce(x, group)


def _scatter_without_sum(ctx, x, dim, group, sent):
    ctx.dim, ctx.group, ctx.sent = dim, group, sent
    return _own_part(x, dim, group)


def _divide_gradients(by: float):
    def shard(units, *args):
        units = list(units)
        shard_over_data(units, *args)
        for unit in units:
            unit.module.set_gradient_divide_factor(by)

    return shard


def _with_whole_gradient(init: Callable):
    def init_wrongly(self, *args):
        init(self, *args)
        self.weight_grad = Replicate()

    return init_wrongly


def _all_counted(named_parameters: Callable):
    return lambda self: [replace(item, counted=True) for item in named_parameters(self)]


def _counts_of_this_rank(count: Callable):
    def count_locally(self, *args):
        with_all_reduce, dist.all_reduce = dist.all_reduce, lambda *args, **kwargs: None
        try:
            return count(self, *args)
        finally:
            dist.all_reduce = with_all_reduce

    return count_locally


def _mask_not_shifted(shift: Callable):
    def shifted(labels_BS, mask_BS, mtp_depth, documents_BS=None):
        return shift(labels_BS, mask_BS, mtp_depth)[0], mask_BS.unsqueeze(1).expand(-1, mtp_depth + 1, -1)

    return shifted


def _scaled_schedules(get_class: Callable):
    """Schedules that divide gradients by the number of micro-batches, torch's default."""
    def scaled(name):
        kind = get_class(name)
        return type(kind.__name__, (kind,), {
            "__init__": lambda self, *args, **kwargs: kind.__init__(self, *args, **kwargs | {"scale_grads": True})})

    return scaled


def _forget_last_weight_gradient(take: Callable):
    def take_less(self):
        self._pending = self._pending[:-1]
        return take(self)

    return take_less


def _save_weight(ctx, x, weight, deferred):
    ctx.save_for_backward(x, weight)
    ctx.deferred = deferred
    return torch.nn.functional.linear(x, weight)


def _saved_weight(ctx, grad):
    x, weight = ctx.saved_tensors
    ctx.deferred.defer(weight, lambda: grad.flatten(0, -2).t() @ x.flatten(0, -2))
    return grad @ weight, None, None


def _shift_own_part(labels_BS, mask_BS, mtp_depth, documents_BS=None):
    """Chunks 0 and 3, 1 and 2 of 4 shifted by themselves, as ranks would that cut first."""
    order = torch.tensor([0, 1, 6, 7, 2, 3, 4, 5])
    halves = [shifts.shifted_labels(labels, mask, mtp_depth)
              for labels, mask in zip(labels_BS[:, order].chunk(2, 1), mask_BS[:, order].chunk(2, 1))]
    return tuple(torch.cat(parts, -1)[..., order.argsort()] for parts in zip(*halves))


def _across_documents(labels_BS, mask_BS, mtp_depth, documents_BS):
    return shifts.shifted_labels(labels_BS, mask_BS, mtp_depth)


def _add_plainly(self, queries, out, lse):
    self.out_BNSV[queries] += out / 2
    self.lse_BNS[queries] = torch.logaddexp(self.lse_BNS[queries], lse)


def _own_block_only(of: Callable):
    return lambda self, owner: of(self, owner) if owner == self.rank else (slice(0, 0), [])


def _twice(gradient_of_block: Callable):
    return lambda *args: 2 * gradient_of_block(*args)


def _last_micro_batch_only(self, reports):
    self.reports = {name: value.detach() for name, value in reports.items()}


def _counts_times_cp(count: Callable):
    def count_wrongly(self, *args):
        counts, num_sequences = count(self, *args)
        return {name: value * self.cp.size for name, value in counts.items()}, num_sequences

    return count_wrongly


def _first_inputs(own_part: Callable):
    """The first half of each, as long as this rank's part is."""
    def cut_wrongly(rows, batch, cp):
        own = own_part(rows, batch, cp)
        inputs = {name: tensor.chunk(cp.size, 1)[0] for name, tensor in rows.inputs.items()}
        return replace(own, inputs=inputs)

    return cut_wrongly


def _repeated(x: torch.Tensor, dim: int, group) -> torch.Tensor:
    return torch.cat([x] * group.size(), dim)


def _first_node_only(sum_copies: Callable):
    def sum_less(y, weights, copies):
        weights = weights.clone()
        weights[:, 1:] = 0
        return sum_copies(y, weights, copies)

    return sum_less


class _GatherOnly(torch.autograd.Function):
    """All-gather whose gradients stay where they were made."""

    @staticmethod
    def forward(ctx, x, dim, group, sent):
        ctx.dim, ctx.group = dim, group
        return collectives.all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        return _own_part(grad, ctx.dim, ctx.group), None, None, None


def _last_first(place: Callable, experts_BN: torch.Tensor, order_BN: torch.Tensor) -> torch.Tensor:
    return place(experts_BN, order_BN.flip(1))


def _tails_too(real_BS, mtp_depth, documents_BS=None):
    return real_BS.unsqueeze(1).expand(-1, 1 + mtp_depth, -1)


def _padding_too(real_BS, mtp_depth, documents_BS=None):
    return shifts.routed_tokens(torch.ones_like(real_BS), mtp_depth, documents_BS)


MUTATIONS = {
    "TP: gradient of a copied input not summed": Mutation(
        TP, _method(collectives.CopyToTensorRanks, "backward", lambda ctx, grad: (grad, None))),
    "TP: partial sums not summed": Mutation(
        TP, _method(collectives.SumOverTensorRanks, "forward", lambda ctx, x, group: x.clone())),
    "TP: gradient of a replicated sum summed again": Mutation(
        TP, _method(collectives.SumOverTensorRanks, "forward", _sum_forward),
        _method(collectives.SumOverTensorRanks, "backward",
                lambda ctx, grad: (collectives.all_reduce(grad, ctx.group), None))),
    "TP: tokens split, their gradients not gathered": Mutation(
        TP, _method(collectives.SplitTokens, "backward",
                    lambda ctx, grad: (_only_own_part(grad, ctx.dim, ctx.group), None, None))),
    "TP: tokens joined, their gradients summed": Mutation(
        TP, _method(collectives.JoinTokens, "backward",
                    lambda ctx, grad: (collectives.reduce_scatter(grad, ctx.dim, ctx.group), None, None))),
    "TP: cross-entropy of this rank's vocabulary": Mutation(TP, _no_all_reduce(vocabulary)),
    "TP: a replicated weight counts on every rank in the norm": Mutation(
        TP, _replace(optimizer, "counts_in_norm", lambda item: item.counted)),
    "TP: the router's gradient taken for whole": Mutation(
        TP, _replace(Router, "__init__", _with_whole_gradient(Router.__init__))),
    "SP: gathered, gradients not summed": Mutation(
        SP, _method(collectives.GatherSum, "backward",
                    lambda ctx, grad: (_own_part(grad, ctx.dim, ctx.group), None, None, None))),
    "SP: scattered, partial sums not summed": Mutation(
        SP, _method(collectives.ScatterSum, "forward", _scatter_without_sum)),
    "SP: scattered, gradients not gathered": Mutation(
        SP, _method(collectives.ScatterSum, "backward",
                    lambda ctx, grad: (_only_own_part(grad, ctx.dim, ctx.group), None, None, None))),
    "SP: a norm's gradient taken for whole": Mutation(
        SP, _replace(tensor.TensorParallel, "activation_grad", property(lambda self: Replicate()))),
    "TP: balance loss of this rank's counts": Mutation(SOFTMAX_TP, _no_all_reduce(balance_loss)),
    "DP: gradients divided by the data ranks": Mutation(DP, _replace(build, "shard_over_data", _divide_gradients(2.0))),
    "DP: labels counted on each rank": Mutation(
        DP, _replace(trainer.Trainer, "global_counts", _counts_of_this_rank(trainer.Trainer.global_counts))),
    "DP: experts counted on each rank": Mutation(DP, _no_all_reduce(balance)),
    "DP: gradients reduced before the last micro-batch only": Mutation(
        DP, _replace(pipeline, "synchronize_gradients", lambda module, enabled: module.set_requires_gradient_sync(
            not enabled))),
    "EP: gradients stay with the experts' ranks": Mutation(
        EP, _method(expert.AllToAllRows, "backward",
                    lambda ctx, grad: (grad.new_zeros(sum(ctx.sent), *grad.shape[1:]), *[None] * 4))),
    "PP: copies of the embedding not summed": Mutation(
        PP_MTP, _replace(SharedParameter, "sum_gradients", lambda self: None)),
    "PP: copies on one rank not summed": Mutation(
        V_TIED, _replace(SharedParameter, "sum_gradients", lambda self: None)),
    "PP: every copy counts in the norm": Mutation(
        PP_MTP, _replace(trainer.Trainer, "named_parameters", _all_counted(trainer.Trainer.named_parameters))),
    "PP: gradients divided by the micro-batches": Mutation(
        V_TIED, _replace(pipeline, "get_schedule_class", _scaled_schedules(pipeline.get_schedule_class))),
    "PP: a stage's gradients are not reduced": Mutation(PP_DP, _replace(
        ReducingStage, "backward_maybe_with_nosync", PipelineStage.backward_maybe_with_nosync)),
    "ZB: a weight gradient is forgotten": Mutation(
        V_TIED, _replace(DeferredGradients, "take", _forget_last_weight_gradient(DeferredGradients.take))),
    "ZB: the weight of a recomputed layer is saved, not kept": Mutation(
        DROPPED_LEAF, _method(zero_bubble.DeferringLinear, "forward", _save_weight),
        _method(zero_bubble.DeferringLinear, "backward", _saved_weight)),
    "CP: every rank takes the first positions": Mutation(
        CP, _replace(context.ContextParallel, "positions", lambda self, length: context.zigzag(length, 0, self.size))),
    "CP: MTP labels shifted after the cut": Mutation(CP, _replace(division, "shifted_labels", _shift_own_part)),
    "CP: parts added without their log-sum-exp": Mutation(CP, _replace(attention.LogSumExpMerge, "add", _add_plainly)),
    "CP: gradients of other ranks' latents not sent home": Mutation(
        CP, _replace(exchange.Ring, "return_gradients", lambda self, gradients: list(gradients)[0])),
    "CP: gathered latents' gradients not summed": Mutation(
        CP_GATHER, _replace(exchange, "reduce_scatter", _own_part)),
    "CP: one block's gradient comes twice": Mutation(
        CP, _replace(blockwise_attention, "gradient_of_block", _twice(blockwise_attention.gradient_of_block))),
    "CP: balance loss of this rank's counts": Mutation(CP_BALANCE, _no_all_reduce(balance_loss)),
    "CP: losses divided by cp": Mutation(CP, _replace(trainer.Trainer, "global_counts", _counts_times_cp(
        trainer.Trainer.global_counts))),
    "EP: tokens gathered, their gradients not summed": Mutation(
        GATHER, _method(collectives.GatherSum, "backward",
                        lambda ctx, grad: (_own_part(grad, ctx.dim, ctx.group), None, None, None))),
    "ETP: partial sums of the slices not summed": Mutation(SLICED, _replace(expert_tensor, "scatter_sum", _own_part)),
    "ETP: gradients of gathered rows not summed": Mutation(
        SLICED, _replace(expert_tensor, "gather_sum", _GatherOnly.apply)),
    "ETP: every slice gives the whole result": Mutation(
        SLICED, _replace(expert_tensor, "sum_copies", lambda y, weights, copies: copies_.sum_copies(
            y, 2 * weights, copies))),
    "ETP: gate and up rows divided as one matrix": Mutation(
        SLICED, _replace(moe, "COLUMN_PARALLEL", (Shard(0), Shard(1)))),
    "capacity: each rank drops of its own tokens": Mutation(
        LIMITED, _replace(Capacity, "keep", lambda self, experts, weights, positions, group, keep=Capacity.keep: keep(
            self, experts, weights, positions, None))),
    "capacity: the least weights are kept": Mutation(
        LIMITED, _replace(capacity, "place_in_expert", partial(_last_first, capacity.place_in_expert))),
    "padding goes to experts": Mutation(LIMITED, _replace(division, "routed_tokens", _padding_too)),
    "MTP: positions without a label go to experts": Mutation(LIMITED, _replace(division, "routed_tokens", _tails_too)),
    "padding counts in the balance loss": Mutation(
        LIMITED, _replace(moe, "balance_loss", lambda *args: balance_loss.balance_loss(*args[:-1], None))),
    "EP: one node's partial sum is lost": Mutation(GROUPED, _replace(expert_grouped, "sum_copies", _first_node_only(
        expert_grouped.sum_copies))),
    "MTP: labels of the next document": Mutation(PACKED, _replace(division, "shifted_labels", _across_documents)),
    "CP: attention across documents": Mutation(PACKED, _replace(
        documents, "documents_of", lambda row: {0: slice(0, len(row))})),
    "CP: documents of other ranks' chunks not seen": Mutation(PACKED, _replace(
        block_mask.BlockMask, "of", _own_block_only(block_mask.BlockMask.of))),
    "attention across documents": Mutation(PACKED_DP, _replace(
        documents, "documents_of", lambda row: {0: slice(0, len(row))})),
    "attention: every micro-batch has the first one's documents": Mutation(PACKED_DP, _replace(
        documents.Documents, "__getitem__", lambda self, rows: documents.Documents(
            self.rows[:rows.stop - rows.start]))),
    "CP: a row's sum is of this rank's tokens": Mutation(
        CP_SAMPLES, _replace(sequence_sums.SequenceSums, "over_ranks", lambda self, x: x)),
    "CP: gradients of a row's sum stay with the rank that used it": Mutation(
        CP_SAMPLES, _replace(sequence_sums, "sum_gradients", lambda x, group: x)),
    "CP: every rank gives the whole term of a row": Mutation(
        CP_PAIRS, _replace(sequence_sums.SequenceSums, "share", lambda self, x: x.sum())),
    "CP: an objective's own inputs are not cut": Mutation(CP_PAIRS, _replace(
        division, "own_part", _first_inputs(division.own_part))),
    "CP: scores in the order of the ranks": Mutation(CP, _replace(
        trainer, "whole_sequences", lambda own, meshes: own if meshes.layout.cp == 1 else collectives.all_gather(
            own, 1, meshes.group("cp")))),
    "TP: log-probabilities of this rank's ids alone": Mutation(
        TP_DISTILLED, _replace(vocabulary_logits, "sum_alike", lambda x, group: x)),
    "TP: experts of this rank's tokens alone": Mutation(TP, _replace(scoring, "all_gather", _repeated)),
    "reports of the last micro-batch only": Mutation(PACKED_DP, _replace(
        step.StepStatistics, "add_reports", _last_micro_batch_only)),
    "MTP: labels shifted, their mask not": Mutation(
        PP_MTP, _replace(division, "shifted_labels", _mask_not_shifted(division.shifted_labels))),
}


def run_mutated(name: str) -> Record:
    mutation = MUTATIONS[name]
    for change in mutation.changes:
        change()
    return run_case(mutation.case, num_steps=1)
