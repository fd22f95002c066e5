"""One rank's share of a training job: its stages, the pipeline that runs them, the optimizer, and the step.

A step, whatever the layout and the objective:
  1. cut sequences over context ranks; count what the losses are divided by, over the global batch
  2. forward and backward of all micro-batches; FSDP sums gradients over the data ranks
  3. sum the gradients of parameters that several stages hold
  4. norm of the whole gradient, clip
  5. AdamW, then the routers' biases
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, build_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.frozen import trained_parameters
from megatron_deepseek.model.positions import REPLAYED
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Rows, StepContext, StepStatistics
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.data import gather_once
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.nodes import Traffic
from megatron_deepseek.parallel.pipeline import Pipeline, Travel
from megatron_deepseek.parallel.schedule_rules import rank_of_stage, stages_of_rank
from megatron_deepseek.parallel.shared import find_shared
from megatron_deepseek.parallel.sums import sum_numbers
from megatron_deepseek.parallel.watch import Watch, unwatched
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.balance import update_expert_bias
from megatron_deepseek.training.division import Division, divide
from megatron_deepseek.training.next_token import NextToken
from megatron_deepseek.training.objective import Losses, Objective
from megatron_deepseek.training.optimizer import (
    NamedParameter,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
    squared_gradient_norm,
)
from megatron_deepseek.training.replay import check_replay
from megatron_deepseek.training.scoring import (
    Distribution,
    Keep,
    Scores,
    chosen_experts,
    from_stage,
    likeliest,
    whole_sequences,
)


@dataclass(frozen=True)
class TrainingSpec:
    """The specification of a training: the architecture, its division over pipeline ranks, and how it is built.

    settings.py explains the fields.
    """

    model: ModelConfig
    stages: tuple[Stage, ...]
    schedule: str
    seq_length: int
    micro_batch_size: int
    build: BuildOptions = BuildOptions()
    optimizer: OptimizerSettings = OptimizerSettings()


@dataclass(frozen=True)
class StopFlags:
    """The requests of a rank between steps, to save or to leave the run. What one rank requests, all ranks do."""

    save: bool = False
    leave: bool = False


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank of a pipeline stage.

    `expert_counts`: tokens that chose each expert, int64 [E] by layer of this stage. `traffic`: bytes that the expert
    dispatch of all ranks sent in the step, recomputed forwards included. `dropped`: the part of all token copies that
    was above experts' capacity. `cross_node_sends`: to how many other nodes a token went for a layer's experts, on
    average. `updated`: False where a loss or the gradient was not finite; weights, moments and biases are then as
    before. `stop_flags`: the requests of all ranks together.
    """

    losses: Losses
    grad_norm: float
    expert_counts: dict[str, torch.Tensor]
    traffic: Traffic
    dropped: float = 0.0
    cross_node_sends: float = 0.0
    updated: bool = True
    stop_flags: StopFlags = StopFlags()


class Trainer:
    """A rank's trainer. Every rank of the job builds one and calls it in the same order.

    Without `objective` it trains to predict the next token. A dry run (dry_run/) has its stages made by another `make`,
    without initial weights, and a `watch` that is told of every act of the pipeline.
    """

    def __init__(self, spec: TrainingSpec, meshes: Meshes, objective: Objective | None = None,
                 make: Callable[..., list[DeepseekStage]] = build_stages, watch: Watch = unwatched):
        self.spec, self.meshes, self.cp = spec, meshes, ContextParallel(meshes.cp)
        self.objective = objective or NextToken(spec.model.num_nextn_predict_layers,
                                                spec.build.loss.mtp_loss_scaling_factor)
        self.holders = [rank_of_stage(s, len(spec.stages), meshes.layout.pp, spec.schedule)
                        for s in range(len(spec.stages))]
        self.indices = stages_of_rank(meshes.rank("pp"), len(spec.stages), meshes.layout.pp, spec.schedule)
        self.stages = make(spec.model, [spec.stages[i] for i in self.indices], meshes, spec.seq_length, spec.build)
        for unused in (layer for stage in self.stages for layer in stage.mtp_layers(self.objective.num_depths)):
            gather_once(unused)
        self.counter = self.stages[0].counter  # one counter for all stages
        self.shared = find_shared(_embedding_holders(spec), self.holders, dict(zip(self.indices, self.stages)), meshes)
        self.parameters = self.named_parameters()
        self.optimizer = build_optimizer(self.parameters, spec.optimizer)
        overlapped = spec.build.communication.overlap_moe_expert_parallel_comm
        self.pipeline = Pipeline(self.stages, self.indices, travel_between_stages(spec, meshes), spec.schedule, meshes,
                                 self.stages[0].overlap if overlapped else None, watch)

    def named_parameters(self) -> list[NamedParameter]:
        """Return every trained parameter of this rank; of copies on several stages the first holder's first counts."""
        counted = {shared.name: shared.copies[0] if shared.counted_here and shared.copies else None
                   for shared in self.shared}
        return [NamedParameter(name, parameter, counted.get(name, parameter) is parameter)
                for stage in self.stages for name, parameter in trained_parameters(stage)]

    def train_step(self, batch: Batch, learning_rate: float, bias_rate: float = 0.0,
                   stop_flags: Callable[[], StopFlags] = StopFlags) -> StepResult:
        """Make one step on this data rank's rows of the global batch, a multiple of micro_batch_size.

        `stop_flags` is asked when the ranks add up their losses, and travels with them.
        """
        divided, counts, step = self._begin(batch, self.objective)
        self.optimizer.zero_grad()
        self.counter.take()  # what an evaluation sent
        self.pipeline.train(divided.tokens_BS, divided.micro_batches, step, 1 + self.objective.num_depths)
        for shared in self.shared:
            shared.sum_gradients()
        own = self._own_sums(step.statistics, stop_flags())
        losses, sums = self._reduce(self.objective, step.statistics, divided, counts, own)
        norm = math.sqrt(sums.pop("squared_gradient_norm"))
        healthy = losses.finite() and math.isfinite(norm)
        if healthy:
            self._update(norm, learning_rate)
        expert_counts = update_expert_bias(self.stages, step.statistics.expert_counts, bias_rate if healthy else 0.0,
                                           self.meshes.stage.get_group())
        return self._result(losses, norm, expert_counts, healthy, **sums)

    def _update(self, norm: float, learning_rate: float) -> None:
        if self.spec.optimizer.clip_grad:
            clip_gradients(self.parameters, norm, self.spec.optimizer.clip_grad)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()

    def evaluate(self, batch: Batch, objective: Objective | None = None) -> Losses:
        """Return the losses of a batch without training on it: those of `objective`, or else of what is trained for."""
        objective = objective or self.objective
        divided, counts, step = self._begin(batch, objective)
        self.pipeline.evaluate(divided.tokens_BS, divided.micro_batches, step, 1 + objective.num_depths)
        return self._reduce(objective, step.statistics, divided, counts, {})[0]

    def score(self, batch: Batch, experts: bool = False, likeliest: bool = False,
              distribution: Distribution = Distribution()) -> Scores:
        """Return log p(label) of each token of this data rank's rows and, if asked for, which experts tokens chose, and
        whether a label is the likeliest. `distribution` says at which temperature and among which ids p is.

        Nothing is trained. Every rank of the job calls it, with the same number of rows.
        """
        statistics = StepStatistics(chosen={} if experts else None)
        wide = torch.promote_types(self.spec.build.precision.activations, torch.float32)
        if likeliest:
            both_BS2 = self.read(batch, distribution.log_probabilities_and_likeliest, wide, statistics, 2)
            scores, right_BS = both_BS2[..., 0], both_BS2[..., 1] > 0
        else:
            scores, right_BS = self.read(batch, distribution.log_probabilities, wide, statistics), None
        if not experts:
            return Scores(scores, right_BS)
        like_BSK = batch.tokens_BS.new_empty(*batch.tokens_BS.shape, self.spec.model.num_experts_per_tok or 0)
        return Scores(scores, right_BS, chosen_experts(statistics.chosen, like_BSK, self._moe_holders(), self.meshes))

    def likeliest(self, batch: Batch) -> torch.Tensor:
        """Return the id that is the likeliest after each token, [B, S], on every rank that has the rows.

        Labels of the batch do not matter. Every rank of the job calls it, with the same number of rows.
        """
        return self.read(batch, likeliest, torch.int64, StepStatistics())

    def read(self, batch: Batch, read: Callable[[Predictions, Rows], torch.Tensor], dtype: torch.dtype,
             statistics: StepStatistics, *width: int) -> torch.Tensor:
        """Return what `read` takes of the main prediction of each token, [B, S, *width] of `dtype`, on every rank."""
        like = batch.tokens_BS.new_empty(*batch.tokens_BS.shape, *width, dtype=dtype)
        return from_stage(self.read_at_head(batch, read, statistics), like, self.holders[-1], self.meshes)

    def read_at_head(self, batch: Batch, read: Callable[[Predictions, Rows], torch.Tensor], statistics: StepStatistics
                     ) -> torch.Tensor | None:
        """Return the same on the ranks that hold the output head, None on all others. Every rank of the job calls it.
        """
        objective = Keep(read)
        divided = self._divide(batch, objective)
        step = StepContext(1, partial(objective.contribution, counts={}), statistics)
        self.pipeline.evaluate(divided.tokens_BS, divided.micro_batches, step, 1)
        return whole_sequences(torch.cat(objective.kept), self.meshes) if objective.kept else None

    def _moe_holders(self) -> dict[str, int]:
        """Return the pipeline rank of each layer of the main model that has routed experts."""
        return {f"model.layers.{index}.mlp": holder for stage, holder in zip(self.spec.stages, self.holders)
                for index in stage.layers if self.spec.model.is_moe_layer(index)}

    def _begin(self, batch: Batch, objective: Objective) -> tuple[Division, dict[str, float], StepContext]:
        """Return the divided batch, what its losses are divided by, and the context of the step."""
        divided = self._divide(batch, objective)
        counts, num_sequences = self.global_counts(divided, objective)
        return divided, counts, StepContext(num_sequences, partial(objective.contribution, counts=counts))

    def _divide(self, batch: Batch, objective: Objective) -> Division:
        check_replay(batch.per_token.get(REPLAYED), self.spec.model, self.spec.build.loss)
        return divide(batch, objective, self.cp, self.spec.micro_batch_size, self.spec.model.n_routed_experts > 0)

    def global_counts(self, divided: Division, objective: Objective) -> tuple[dict[str, float], int]:
        """Return what the objective counts, and the number of sequences, of the global batch.

        Context and tensor ranks were given the same rows, so the sum is over data ranks only.
        """
        own = dict(objective.counts(divided.rows))
        *counts, num_sequences = sum_numbers((*own.values(), divided.num_sequences), self.meshes.device,
                                             self.meshes.group("dp"))
        return dict(zip(own, counts)), max(1, int(num_sequences))

    def _own_sums(self, statistics: StepStatistics, stop_flags: StopFlags) -> dict[str, float | torch.Tensor]:
        """Return what a step adds up over all ranks beside losses, by the names of `_result`."""
        sent = self.counter.take()
        return {"squared_gradient_norm": squared_gradient_norm(self.parameters, self.meshes.device),
                "save": stop_flags.save, "leave": stop_flags.leave, "within_node": sent.within_node,
                "across_nodes": sent.across_nodes, "cross_node_sends": statistics.cross_node_sends,
                "dropped": statistics.dropped, "copies": statistics.copies}

    def _reduce(self, objective: Objective, statistics: StepStatistics, divided: Division, counts: Mapping[str, float],
                own: Mapping[str, float | torch.Tensor]) -> tuple[Losses, dict[str, float]]:
        """Sum the reports, the balance loss and the numbers in `own` over the ranks, in one collective.

        Reports are the same on all TP ranks, of which the first one counts; each has a share of the balance loss.
        """
        names, first_tp = objective.reported(divided.rows), self.meshes.rank("tp") == 0
        if statistics.reports:
            assert statistics.reports.keys() == set(names), (names, [*statistics.reports])
        values = [statistics.reports.get(name, 0.0) if first_tp else 0.0 for name in names]
        values += [statistics.balance_loss, *own.values()]
        sums = sum_numbers(values, self.meshes.device)
        reports, (balance_loss, *others) = sums[:len(names)], sums[len(names):]
        return objective.losses(dict(zip(names, reports)), balance_loss, counts), dict(zip(own, others))

    def _result(self, losses: Losses, norm: float, expert_counts: dict[str, torch.Tensor], updated: bool, *,
                save: float, leave: float, within_node: float, across_nodes: float, cross_node_sends: float,
                dropped: float, copies: float) -> StepResult:
        """Return the result of a step, of sums over all ranks."""
        tokens = copies / (self.spec.model.num_experts_per_tok or 1)
        return StepResult(losses, norm, expert_counts, Traffic(int(within_node), int(across_nodes)),
                          dropped / max(copies, 1), cross_node_sends / max(tokens, 1), updated,
                          StopFlags(save > 0, leave > 0))


def _embedding_holders(spec: TrainingSpec) -> dict[str, list[int]]:
    """Return the stages that use the embedding: the first, those with MTP modules, and with tied weights the head's."""
    tied = spec.model.tie_word_embeddings
    holding = [i for i, stage in enumerate(spec.stages) if stage.embedding or stage.mtp or (stage.loss and tied)]
    return {"model.embed_tokens.weight": holding}


def travel_between_stages(spec: TrainingSpec, meshes: Meshes) -> Travel:
    """Return the shapes that travel between stages: hidden states of the main model and of each MTP depth so far.

    They are stacked along the batch, those of the main model first.

    Raise ValueError for a sequence that the ranks cannot share evenly.
    """
    layout = meshes.layout
    shared = layout.sequence_parallel or spec.model.n_routed_experts > 0
    if shared and spec.seq_length % (layout.cp * layout.tp):
        raise ValueError(f"sequences of {spec.seq_length} tokens do not divide over cp {layout.cp} x tp {layout.tp} "
                         "ranks")
    own_length = spec.seq_length // layout.cp
    slice_length = own_length // (layout.tp if layout.sequence_parallel else 1)
    return Travel(tokens_shape=(spec.micro_batch_size, own_length),
                  hidden_shape=(spec.micro_batch_size, slice_length, spec.model.hidden_size),
                  hidden_dtype=spec.build.precision.activations,
                  states_after=tuple(1 + depths for depths in accumulate(len(stage.mtp) for stage in spec.stages)))
