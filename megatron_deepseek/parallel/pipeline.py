"""Pipeline parallelism by torch.distributed.pipelining: which rank holds which stage, and how a step runs over them.

    loop       rank r holds stages r, r + PP, ...            GPipe, 1F1B (one stage), Interleaved1F1B, -ZeroBubble
    V-shaped   rank r holds stages r and 2 PP - 1 - r        ZBVZeroBubble, DualPipeV (first and last on one rank)

The shapes of what is sent are known beforehand, so no forward is spent on finding them. With PP = 1 a step is a plain
loop over micro-batches that accumulates gradients and reduces them in the last backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from megatron_deepseek.parallel.data import reshard, synchronize_gradients
from megatron_deepseek.parallel.forward_only import ForwardOnly
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.paired_chunks import overlap_pairs
from megatron_deepseek.parallel.schedule_rules import rank_of_stage
from megatron_deepseek.parallel.stage import MicroBatches, ReducingStage, SendingStage
from megatron_deepseek.parallel.watch import Act, Watch, unwatched
from megatron_deepseek.parallel.zero_bubble import DeferredGradients, defer_weight_gradients

ZERO_BUBBLE = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def _loss_is_output(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the last stage's output: it computes the loss itself, since MTP and the head's weight are there."""
    return output


@dataclass(frozen=True)
class Travel:
    """The shapes of what is sent between stages: hidden states [B, S, H] of one micro-batch, stacked along the batch
    where several predictions are made of each token.

    `states_after`: the number of predictions that have a state behind each stage, if all are made. `tokens_shape`: that
    of the token ids which the first stage receives. `first_trained`: the first stage whose output has a gradient.
    """

    tokens_shape: tuple[int, int]
    hidden_shape: tuple[int, int, int]
    hidden_dtype: torch.dtype
    states_after: tuple[int, ...]
    first_trained: int = 0

    @property
    def num_stages(self) -> int:
        return len(self.states_after)

    def received(self, index: int, num_predictions: int) -> torch.Tensor:
        """Return what stage `index` receives, on the meta device."""
        if index == 0:
            return torch.empty(self.tokens_shape, dtype=torch.int64, device="meta")
        return self.passed_on(index - 1, num_predictions)

    def passed_on(self, index: int, num_predictions: int) -> torch.Tensor:
        """Return what stage `index` sends to the next, or the last one's loss, on the meta device."""
        if index == self.num_stages - 1:
            wide = torch.promote_types(self.hidden_dtype, torch.float32)
            return torch.empty((), dtype=wide, device="meta", requires_grad=True)
        rows, *others = self.hidden_shape
        states = min(self.states_after[index], num_predictions)
        return torch.empty(states * rows, *others, dtype=self.hidden_dtype, device="meta",
                           requires_grad=index >= self.first_trained)


class Pipeline:
    """Runs steps over this rank's `modules`, which are the stages `indices`.

    A module is called as module(x, micro_batch=, step=); x is int64 [B, S] on stage 0, and the last stage returns the
    micro-batch's scalar contribution to the global loss. Schedules are built at the first step with a given number of
    micro-batches and of predictions, and reused. With `overlap`, one half of a paired chunk computes while the other's
    tokens are on their way. `watch` is told of every act.
    """

    def __init__(self, modules: list[nn.Module], indices: list[int], travel: Travel, schedule: str, meshes: Meshes,
                 overlap: MicroBatchOverlap | None = None, watch: Watch = unwatched):
        self.modules, self.indices, self.schedule = modules, indices, schedule
        self.travel = replace(travel, first_trained=first_trained_stage(modules, indices, travel.num_stages, meshes))
        self.meshes, self.overlap, self._watch = meshes, overlap, watch
        self.holds_first, self.holds_last = 0 in indices, travel.num_stages - 1 in indices
        splits = meshes.layout.pp > 1 and schedule in ZERO_BUBBLE
        self.deferred = [defer_weight_gradients(module) if splits else None for module in modules]
        self._schedules = {}

    def train(self, tokens_BS: torch.Tensor, micro_batches: MicroBatches, step: Any, num_predictions: int) -> None:
        """Run forward and backward of `micro_batches`, equal parts of the rows; gradients are summed over data ranks.

        `num_predictions` counts the predictions of each token: the main one and those of MTP depths.
        """
        for module in self.modules:
            module.train()
        if self.meshes.layout.pp > 1:
            return self._run(tokens_BS, micro_batches, step, num_predictions, train=True)
        (module,), last = self.modules, len(micro_batches.items) - 1
        for i, (x, micro_batch) in enumerate(_with_tokens(tokens_BS, micro_batches)):
            synchronize_gradients(module, i == last)
            with self._watch(Act("F", 0, i)):
                loss = module(x, micro_batch=micro_batch, step=step)
            with self._watch(Act("B", 0, i)):
                loss.backward()
            del loss

    @torch.no_grad()
    def evaluate(self, tokens_BS: torch.Tensor, micro_batches: MicroBatches, step: Any, num_predictions: int) -> None:
        """Run the forward only; its results are left in `step`."""
        for module in self.modules:
            module.eval()
        if self.meshes.layout.pp > 1:
            self._run(tokens_BS, micro_batches, step, num_predictions, train=False)
        else:
            (module,) = self.modules
            for x, micro_batch in _with_tokens(tokens_BS, micro_batches):
                module(x, micro_batch=micro_batch, step=step)
        for module in self.modules:
            reshard(module)

    def _run(self, tokens_BS: torch.Tensor, micro_batches: MicroBatches, step: Any, num_predictions: int, train: bool
             ) -> None:
        args = (tokens_BS,) if self.holds_first else ()
        target = tokens_BS if self.holds_last else None
        key = len(micro_batches.items), num_predictions, train
        if key not in self._schedules:
            self._schedules[key] = self._build_schedule(*key)
        schedule, stages = self._schedules[key]
        run = schedule.step if train else schedule.eval
        run(*args, target=target, return_outputs=False, micro_batches=micro_batches, step=step)
        for stage in stages:
            stage.finish_step()

    def _build_schedule(self, num_microbatches: int, num_predictions: int, train: bool
                        ) -> tuple[Any, list[ReducingStage]]:
        schedule = get_schedule_class(self.schedule) if train else ForwardOnly
        single = issubclass(schedule, PipelineScheduleSingle)
        kind = ReducingStage if single else SendingStage
        stages = [self._stage(kind, *each, num_predictions) for each in zip(self.modules, self.indices, self.deferred)]
        if not train:
            number = self.travel.num_stages
            ranks = [rank_of_stage(s, number, self.meshes.layout.pp, self.schedule) for s in range(number)]
            return ForwardOnly(stages, num_microbatches, _loss_is_output, ranks), stages
        built = schedule(stages[0] if single else stages, num_microbatches, loss_fn=_loss_is_output, scale_grads=False)
        if self.overlap is not None:
            overlap_pairs(built, self.overlap)
        return built, stages

    def _stage(self, kind: type[ReducingStage], module: nn.Module, index: int, deferred: DeferredGradients | None,
               num_predictions: int) -> ReducingStage:
        return kind(module, index, self.travel.num_stages, self.meshes.device,
                    input_args=self.travel.received(index, num_predictions),
                    output_args=self.travel.passed_on(index, num_predictions),
                    group=self.meshes.group("pp"), dw_builder=deferred.take if deferred else None,
                    watch=self._watch)


def first_trained_stage(modules: list[nn.Module], indices: list[int], num_stages: int, meshes: Meshes) -> int:
    """Return the first of all stages with a trained parameter, `num_stages` if none has one; the same on all ranks.

    No stage before it, nor its input, needs a gradient, so none is computed or sent there.
    """
    trained = torch.zeros(num_stages, device=meshes.device)
    for index, module in zip(indices, modules, strict=True):
        trained[index] = any(parameter.requires_grad for parameter in module.parameters())
    dist.all_reduce(trained, group=meshes.group("pp"))
    return next((index for index, number in enumerate(trained.tolist()) if number), num_stages)


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous, as sends require."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def received(x: torch.Tensor) -> torch.Tensor:
    """Return hidden states as a stage must take them first, so that their gradient can be sent back."""
    return _ContiguousGradient.apply(x) if x.requires_grad else x


def _with_tokens(tokens_BS: torch.Tensor, micro_batches: MicroBatches) -> Iterator[tuple[torch.Tensor, Any]]:
    """Return the tokens of each micro-batch, divided as torch.distributed.pipelining does, with its other inputs."""
    return zip(tokens_BS.tensor_split(len(micro_batches.items)), micro_batches.items, strict=True)
