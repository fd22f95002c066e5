"""Pipeline parallelism by torch.distributed.pipelining: which rank holds which stage, and how a step runs over them.

    loop       rank r holds stages r, r + PP, ...            GPipe, 1F1B (one stage), Interleaved1F1B, -ZeroBubble
    V-shaped   rank r holds stages r and 2 PP - 1 - r        ZBVZeroBubble, DualPipeV (first and last on one rank)

Shapes of what travels are known beforehand, so no forward is spent on finding them. A step without stages to pass on
to (PP = 1) is a plain loop over micro-batches that accumulates gradients and reduces them in the last backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
    _add_send_recv,
    _add_unshard_reshard,
    get_schedule_class,
)

from megatron_deepseek.parallel.data import reshard, synchronize_gradients
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.paired_chunks import run_pairs_in_turns
from megatron_deepseek.parallel.schedule_rules import rank_of_stage
from megatron_deepseek.parallel.stage import ReducingStage
from megatron_deepseek.parallel.turns import Turns
from megatron_deepseek.parallel.zero_bubble import DeferredGradients, defer_weight_gradients

ZERO_BUBBLE = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


class ForwardOnly(_PipelineScheduleRuntime):
    """Every micro-batch through every stage, no backward: evaluation under any placement of stages."""

    def __init__(self, stages: list[PipelineStage], n_microbatches: int, loss_fn,
                 ranks: Sequence[int]):
        super().__init__(stages, n_microbatches, loss_fn=loss_fn, scale_grads=False)
        actions = {rank: [] for rank in range(self.pp_group_size)}
        for stage, rank in enumerate(ranks):
            actions[rank] += [_Action(stage, _ComputationType.FORWARD, mb) for mb in range(n_microbatches)]
        self.stage_index_to_group_rank = dict(enumerate(ranks))
        for stage in stages:
            stage.stage_index_to_group_rank = self.stage_index_to_group_rank
        self.pipeline_order_with_comms = _add_send_recv(
            {rank: _add_unshard_reshard(own) for rank, own in actions.items()},
            stage_to_rank=self.stage_index_to_group_rank.__getitem__, num_stages=len(ranks))


def _loss_is_output(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The last stage makes the loss itself, since MTP and the head's weight are there."""
    return output


@dataclass(frozen=True)
class StageShape:
    """What a stage takes from the one before it and passes on; None where it takes token ids or makes the loss."""

    received: tuple[int, ...] | None
    passed_on: tuple[int, ...] | None


class Pipeline:
    """Runs steps over this rank's `modules`, which are the stages `indices`.

    A module is called as module(x, labels=, label_mask=, step=); x is int64 [B, S] on stage 0, and the last stage
    returns the scalar contribution of the micro-batch to the global loss. Schedules are built at the first step with
    a given number of micro-batches, and kept. With `turns`, paired chunks compute while the other's tokens travel.
    """

    def __init__(self, modules: list[nn.Module], indices: list[int], shapes: list[StageShape], schedule: str,
                 hidden_dtype: torch.dtype, tokens_shape: tuple[int, int], meshes: Meshes,
                 turns: Turns | None = None):
        self.modules, self.indices, self.shapes, self.schedule = modules, indices, shapes, schedule
        self.hidden_dtype, self.tokens_shape, self.meshes, self.turns = hidden_dtype, tokens_shape, meshes, turns
        self.holds_first, self.holds_last = 0 in indices, len(shapes) - 1 in indices
        splits = meshes.layout.pp > 1 and schedule in ZERO_BUBBLE
        self.deferred = [defer_weight_gradients(module) if splits else None for module in modules]
        self.first_trained = first_trained_stage(modules, indices, len(shapes), meshes)
        self._schedules = {}

    def train(self, tokens_BS: torch.Tensor, num_microbatches: int, **inputs) -> None:
        """Forward and backward of `num_microbatches` equal parts of the rows; gradients are summed over data ranks.

        `inputs`: tensors are divided along their first dimension, anything else goes to every micro-batch.
        """
        for module in self.modules:
            module.train()
        if self.meshes.layout.pp > 1:
            return self._run(self._schedule(num_microbatches, train=True).step, tokens_BS, **inputs)
        (module,) = self.modules
        for i, (x, kwargs) in enumerate(_micro_batches(tokens_BS, num_microbatches, inputs)):
            synchronize_gradients(module, i == num_microbatches - 1)
            module(x, **kwargs).backward()

    @torch.no_grad()
    def evaluate(self, tokens_BS: torch.Tensor, num_microbatches: int, **inputs) -> None:
        """Forward only; the losses are left in the modules' own tally."""
        for module in self.modules:
            module.eval()
        if self.meshes.layout.pp > 1:
            self._run(self._schedule(num_microbatches, train=False).eval, tokens_BS, **inputs)
        else:
            (module,) = self.modules
            for x, kwargs in _micro_batches(tokens_BS, num_microbatches, inputs):
                module(x, **kwargs)
        for module in self.modules:
            reshard(module)

    def _run(self, run_schedule, tokens_BS, **inputs) -> None:
        args = (tokens_BS,) if self.holds_first else ()
        target = tokens_BS if self.holds_last else None
        run_schedule(*args, target=target, return_outputs=False, **inputs)

    def _schedule(self, num_microbatches: int, train: bool):
        key = num_microbatches, train
        if key not in self._schedules:
            self._schedules[key] = self._build_schedule(num_microbatches, train)
        return self._schedules[key]

    def _build_schedule(self, num_microbatches: int, train: bool):
        stages = [self._stage(*each) for each in zip(self.modules, self.indices, self.deferred)]
        if not train:
            ranks = [rank_of_stage(s, len(self.shapes), self.meshes.layout.pp, self.schedule)
                     for s in range(len(self.shapes))]
            return ForwardOnly(stages, num_microbatches, _loss_is_output, ranks)
        kind = get_schedule_class(self.schedule)
        single = issubclass(kind, PipelineScheduleSingle)
        schedule = kind(stages[0] if single else stages, num_microbatches, loss_fn=_loss_is_output, scale_grads=False)
        if self.turns is not None:
            run_pairs_in_turns(schedule, self.turns)
        return schedule

    def _stage(self, module: nn.Module, index: int, deferred: DeferredGradients | None) -> PipelineStage:
        shape = self.shapes[index]
        takes, gives = index > self.first_trained, index >= self.first_trained  # a gradient of what comes, what goes
        received = torch.empty(self.tokens_shape, dtype=torch.int64, device="meta") if shape.received is None else \
            torch.empty(shape.received, dtype=self.hidden_dtype, device="meta", requires_grad=takes)
        passed_on = torch.empty((), dtype=torch.promote_types(self.hidden_dtype, torch.float32), device="meta",
                                requires_grad=gives) if shape.passed_on is None else \
            torch.empty(shape.passed_on, dtype=self.hidden_dtype, device="meta", requires_grad=gives)
        return ReducingStage(module, index, len(self.shapes), self.meshes.device, input_args=received,
                             output_args=passed_on, group=self.meshes.group("pp"),
                             dw_builder=deferred.take if deferred else None)


def first_trained_stage(modules: list[nn.Module], indices: list[int], num_stages: int, meshes: Meshes) -> int:
    """The first of all stages with a parameter that is trained, `num_stages` if none has one; the same on every rank.

    No stage before it, nor what it receives, needs a gradient, so none is computed or sent there.
    """
    trained = torch.zeros(num_stages, device=meshes.device)
    for index, module in zip(indices, modules, strict=True):
        trained[index] = any(parameter.requires_grad for parameter in module.parameters())
    dist.all_reduce(trained, group=meshes.group("pp"))
    return next((index for index, number in enumerate(trained.tolist()) if number), num_stages)


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is laid out as a send needs it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def received(x: torch.Tensor) -> torch.Tensor:
    """Hidden states as a stage's first act takes them, so that their gradient can be sent back as it is."""
    return _ContiguousGradient.apply(x) if x.requires_grad else x


def _micro_batches(tokens_BS: torch.Tensor, number: int, inputs: dict):
    """(tokens, other inputs) of each micro-batch, as torch.distributed.pipelining divides them."""
    split = {name: value.tensor_split(number) if isinstance(value, torch.Tensor) else [value] * number
             for name, value in inputs.items()}
    for i, x in enumerate(tokens_BS.tensor_split(number)):
        yield x, {name: parts[i] for name, parts in split.items()}
