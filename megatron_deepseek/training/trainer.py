"""One rank's share of a training job: its stages, the pipeline that runs them, the optimizer, and the step.

A step, whatever the layout:
  1. count the valid labels of the global batch: every loss is a sum divided by a global count; then cut sequences
  2. forward and backward of all micro-batches; FSDP sums gradients over the data ranks
  3. sum the gradients of parameters that several stages hold
  4. norm of the whole gradient, clip
  5. AdamW, then the routers' biases
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_deepseek.config import ModelConfig
from megatron_deepseek.model.build import Precision, build_stages
from megatron_deepseek.model.deepseek import StepContext, Tally, routed_tokens, shifted_labels
from megatron_deepseek.model.frozen import trained_parameters
from megatron_deepseek.ops.attention import documents_of
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.nodes import Traffic
from megatron_deepseek.parallel.pipeline import Pipeline, StageShape
from megatron_deepseek.parallel.schedule_rules import rank_of_stage, stages_of_rank
from megatron_deepseek.parallel.shared import find_shared
from megatron_deepseek.training.balance import update_expert_bias
from megatron_deepseek.training.optimizer import (
    NamedParameter,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    set_learning_rate,
)
from megatron_deepseek.settings import (CommunicationSettings, LossSettings, OffloadSettings, OptimizerSettings,
                                        RecomputeSettings)


@dataclass(frozen=True)
class Plan:
    """What to build: the architecture, its division over pipeline ranks, and the numerics. See settings.py.

    `frozen`: wildcard patterns over the names of parameters that are not trained (model/frozen.py).
    """

    model: ModelConfig
    stages: tuple[Stage, ...]
    schedule: str
    seq_length: int
    micro_batch_size: int
    precision: Precision = Precision()
    optimizer: OptimizerSettings = OptimizerSettings()
    loss: LossSettings = LossSettings()
    recompute: RecomputeSettings = RecomputeSettings()
    communication: CommunicationSettings = CommunicationSettings()
    offload: OffloadSettings = OffloadSettings()
    reshard_after_forward: bool = False
    frozen: tuple[str, ...] = ()
    seed: int = 1234


@dataclass(frozen=True)
class Losses:
    """Means over the global batch. `mtp_loss` has one entry for each depth; `balance_loss` is already weighted.

    `sources`: of each dataset of a blend the sum of its main token losses, and its labels. `num_labels`: of the main
    prediction; without any, all are masked, and the losses are 0.
    """

    lm_loss: float
    mtp_loss: tuple[float, ...]
    balance_loss: float
    sources: tuple[tuple[float, int], ...] = ()
    num_labels: int = 1

    def finite(self) -> bool:
        return all(map(math.isfinite, (self.lm_loss, *self.mtp_loss, self.balance_loss)))


@dataclass(frozen=True)
class Votes:
    """What a rank asks for between steps: a checkpoint, an end of the run. What one asks for, all do."""

    save: bool = False
    leave: bool = False


@dataclass(frozen=True)
class StepResult:
    """`traffic`: bytes that the expert dispatch of all ranks sent in the step, recomputed forwards included.

    `updated`: False where a loss or the gradient was not finite; weights, moments and biases are then as before.
    `votes`: of all ranks together, the same everywhere. `dropped`: the part of all token copies that was above experts'
    capacity; `crossings`: to how many other nodes a token went for a layer's experts, on average.
    """

    losses: Losses
    grad_norm: float
    expert_counts: dict[str, torch.Tensor]
    traffic: Traffic
    dropped: float = 0.0
    crossings: float = 0.0
    updated: bool = True
    votes: Votes = Votes()


class Trainer:
    """Build it on every rank of the job, in the same order of calls."""

    def __init__(self, plan: Plan, meshes: Meshes):
        self.plan, self.meshes, self.cp = plan, meshes, ContextParallel(meshes.cp)
        pp = meshes.layout.pp
        holders = [rank_of_stage(s, len(plan.stages), pp, plan.schedule) for s in range(len(plan.stages))]
        self.indices = stages_of_rank(meshes.rank("pp"), len(plan.stages), pp, plan.schedule)
        self.stages = build_stages(plan.model, [plan.stages[i] for i in self.indices], meshes, plan.seq_length,
                                   seed=plan.seed, precision=plan.precision, loss=plan.loss, recompute=plan.recompute,
                                   communication=plan.communication, offload=plan.offload,
                                   reshard_after_forward=plan.reshard_after_forward, frozen=plan.frozen)
        self.meter = self.stages[0].meter  # one for all stages
        self.shared = find_shared(_embedding_holders(plan), holders, dict(zip(self.indices, self.stages)), meshes)
        self.parameters = self._named_parameters()
        self.optimizer = build_optimizer(self.parameters, plan.optimizer)
        self.pipeline = Pipeline(self.stages, self.indices, _stage_shapes(plan, meshes), plan.schedule,
                                 plan.precision.activations,
                                 (plan.micro_batch_size, plan.seq_length // meshes.layout.cp), meshes,
                                 self.stages[0].turns if plan.communication.overlap_moe_expert_parallel_comm else None)

    def _named_parameters(self) -> list[NamedParameter]:
        """Every trained parameter of this rank; of copies on several stages only the first holder's first counts."""
        counted = {shared.name: shared.copies[0] if shared.counted_here and shared.copies else None
                   for shared in self.shared}
        return [NamedParameter(name, parameter, counted.get(name, parameter) is parameter)
                for stage in self.stages for name, parameter in trained_parameters(stage)]

    def train_step(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor,
                   learning_rate: float, bias_rate: float = 0.0, documents_BS: torch.Tensor | None = None,
                   sources_BK: torch.Tensor | None = None, votes: Callable[[], Votes] = Votes,
                   real_BS: torch.Tensor | None = None) -> StepResult:
        """One step on this data rank's rows of the global batch, B = micro-batches x micro_batch_size of them.

        `documents_BS` numbers each token's document; without it attention and MTP see across documents. `sources_BK`
        says which of K datasets each row is from, whose losses are then told apart. `real_BS` is false for padding,
        behind a row's tokens, which no expert gets; None where there is none. `votes` is asked when the ranks add up
        their losses, and travels with them.
        """
        tokens, num_microbatches, inputs = self._prepare(tokens_BS, labels_BS, mask_BS, documents_BS, sources_BK,
                                                         real_BS)
        self.optimizer.zero_grad()
        self.meter.take()  # what an evaluation sent
        self.pipeline.train(tokens, num_microbatches, **inputs)
        for shared in self.shared:
            shared.sum_gradients()
        norm = gradient_norm(self.parameters, self.meshes.device)
        losses, agreed = self._reduce(inputs["step"], votes(), sources_BK)
        healthy = losses.finite() and math.isfinite(norm.item())
        if healthy:
            self._update(norm, learning_rate)
        counts = update_expert_bias(self.stages, inputs["step"].tally.expert_counts, bias_rate if healthy else 0.0,
                                    self.meshes.stage.get_group())
        return StepResult(losses, norm.item(), counts, *self._traffic(inputs["step"].tally), healthy, agreed)

    def _update(self, norm: torch.Tensor, learning_rate: float) -> None:
        if self.plan.optimizer.clip_grad:
            clip_gradients(self.parameters, norm, self.plan.optimizer.clip_grad)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()

    def evaluate(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor,
                 documents_BS: torch.Tensor | None = None, sources_BK: torch.Tensor | None = None,
                 real_BS: torch.Tensor | None = None) -> Losses:
        """Losses of a batch, weights untouched."""
        tokens, num_microbatches, inputs = self._prepare(tokens_BS, labels_BS, mask_BS, documents_BS, sources_BK,
                                                         real_BS)
        self.pipeline.evaluate(tokens, num_microbatches, **inputs)
        return self._reduce(inputs["step"], Votes(), sources_BK)[0]

    def _prepare(self, tokens_BS, labels_BS, mask_BS, documents_BS, sources_BK, real_BS
                 ) -> tuple[torch.Tensor, int, dict]:
        """Tokens, their number of micro-batches and the stages' other inputs. Everything that looks along a sequence
        is made before context-parallel ranks divide it, so that they all know the counts of the whole.
        """
        assert tokens_BS.shape[0] % self.plan.micro_batch_size == 0, (tokens_BS.shape, self.plan.micro_batch_size)
        mtp_depth = self.plan.model.num_nextn_predict_layers
        labels, mask = shifted_labels(labels_BS, mask_BS, mtp_depth, documents_BS)
        counts = torch.cat([mask.sum((0, 2)), mask.new_tensor([tokens_BS.shape[0]], dtype=torch.int64)])
        dist.all_reduce(counts, group=self.meshes.group("dp"))  # cp and tp ranks were given the same rows
        *num_labels, num_sequences = counts.tolist()
        step = StepContext(tuple(num_labels), num_sequences, Tally())
        inputs = dict(labels_BMS=self.cp.own(labels), label_mask_BMS=self.cp.own(mask), step=step)
        if documents_BS is not None:
            inputs["documents_BS"] = documents_BS.cpu()  # attention is started document by document
            for row_S in inputs["documents_BS"]:
                documents_of(row_S)  # refuses a document in two pieces, of which a context rank may see but one
        if sources_BK is not None:
            inputs["sources_BK"] = sources_BK
        if self.plan.model.n_routed_experts and (mtp_depth or real_BS is not None):
            real_BS = torch.ones_like(mask_BS) if real_BS is None else real_BS
            inputs["routed_BMS"] = self.cp.own(routed_tokens(real_BS, mtp_depth, documents_BS))
        return self.cp.own(tokens_BS), tokens_BS.shape[0] // self.plan.micro_batch_size, inputs

    def _reduce(self, step: StepContext, votes: Votes, sources_BK: torch.Tensor | None) -> tuple[Losses, Votes]:
        """Sum the ranks' contributions. Token losses are the same on all TP ranks, shares of the balance loss not."""
        tally, depths = step.tally, 1 + self.plan.model.num_nextn_predict_layers
        device, first_tp = self.meshes.device, self.meshes.rank("tp") == 0
        values = torch.zeros(depths + 3, dtype=torch.float64, device=device)
        sources = torch.zeros(0 if sources_BK is None else sources_BK.shape[1], 2, dtype=torch.float64, device=device)
        for depth, loss in tally.losses.items():
            values[depth] = loss if first_tp else 0
        values[depths] = tally.balance_loss
        values[-2:] = torch.tensor([votes.save, votes.leave])
        if first_tp:
            sources += tally.sources_K2
        together = torch.cat([values, sources.flatten()])
        dist.all_reduce(together)
        lm_loss, *mtp_loss, balance_loss, save, leave = together[:len(values)].tolist()
        by_source = tuple((loss, round(labels)) for loss, labels in together[len(values):].view(-1, 2).tolist())
        losses = Losses(lm_loss, tuple(mtp_loss), balance_loss, by_source, step.num_labels[0])
        return losses, Votes(save > 0, leave > 0)

    def _traffic(self, tally: Tally) -> tuple[Traffic, float, float]:
        """`traffic`, `dropped` and `crossings` of a StepResult."""
        copies = sum(int(counts_E.sum()) for counts_E in tally.expert_counts.values())
        sent = self.meter.take()
        sums = torch.tensor([sent.within_node, sent.across_nodes, tally.crossings, int(tally.dropped), copies],
                            device=self.meshes.device)
        dist.all_reduce(sums)
        within, across, crossings, dropped, copies = sums.tolist()
        tokens = copies / (self.plan.model.num_experts_per_tok or 1)
        return Traffic(within, across), dropped / max(copies, 1), crossings / max(tokens, 1)


def _embedding_holders(plan: Plan) -> dict[str, list[int]]:
    """Stages that use the embedding: the first, those with MTP modules, and with tied weights the head's."""
    tied = plan.model.tie_word_embeddings
    holding = [i for i, stage in enumerate(plan.stages) if stage.embedding or stage.mtp or (stage.loss and tied)]
    return {"model.embed_tokens.weight": holding}


def _stage_shapes(plan: Plan, meshes: Meshes) -> list[StageShape]:
    """Hidden states stacked along the batch: the main model's, then one for each MTP depth already computed.

    Raises ValueError for a sequence that the ranks cannot share evenly.
    """
    layout = meshes.layout
    shared = layout.sequence_parallel or plan.model.n_routed_experts > 0
    if shared and plan.seq_length % (layout.cp * layout.tp):
        raise ValueError(f"sequences of {plan.seq_length} tokens do not divide over cp {layout.cp} x tp {layout.tp} "
                         "ranks")
    seq_length = plan.seq_length // layout.cp // (layout.tp if layout.sequence_parallel else 1)
    shapes, received, states = [], None, 1
    for stage in plan.stages:
        states += len(stage.mtp)
        passed_on = (states * plan.micro_batch_size, seq_length, plan.model.hidden_size)
        shapes.append(StageShape(received, None if stage.loss else passed_on))
        received = passed_on
    return shapes
