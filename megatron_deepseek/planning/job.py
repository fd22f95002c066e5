"""What is planned: the settings of a run, the engine that runs it, and what it is for.

Everything that memory, time and search need of a run is asked here, so that they agree: its stages, how many
micro-batches a step has, what one micro-batch looks like to a layer.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.actions import DUAL_PIPE, Act, actions, held_stages, num_stages
from megatron_deepseek.planning.layer_shapes import Exchanges, LayerShapes, Traffic
from megatron_deepseek.planning.engines import OURS, Engine
from megatron_deepseek.planning.layer_bytes import LayerMode, modes
from megatron_deepseek.planning.node_reach import expected_nodes, nodes_of_experts
from megatron_deepseek.planning.numbers import MAKING, Numbers
from megatron_deepseek.planning.pipeline_balance import resolve, stages
from megatron_deepseek.settings import Settings

SPLIT = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV", DUAL_PIPE)  # parallel/pipeline.py's ZERO_BUBBLE
_actions = lru_cache(512)(actions)
_resolve = lru_cache(512)(resolve)


@dataclass(frozen=True)
class Job:
    """`schedule`: another one than the settings', for those that only plans have (DualPipe). `cut`: stages, None for
    those of the settings. `layer_modes`: for each stage the mode of each of its layers, None for the settings'.
    `cuda`: the device's kernels, or those of CPU. `frozen_base`: adapters alone are trained.
    """

    settings: Settings
    engine: Engine = OURS
    schedule_name: str | None = None
    cut: tuple[Stage, ...] | None = None
    layer_modes: tuple[tuple[LayerMode, ...], ...] | None = None
    imbalance: float = 1.0
    cuda: bool = True
    frozen_base: bool = False

    @property
    def model(self) -> ModelConfig:
        """Return the architecture."""
        return self.settings.model

    @property
    def layout(self) -> Layout:
        """Return the sizes of the meshes."""
        return self.settings.layout

    @property
    def schedule(self) -> str:
        """Return the pipeline schedule's name."""
        return self.schedule_name or self.settings.pipeline.schedule

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Return the parts of the model that the stages hold."""
        if self.cut is not None:
            return self.cut
        pipeline, length = self.settings.pipeline, self.settings.data.seq_length
        if pipeline.layout is not None or self.schedule_name is None:
            return _resolve(self.model, pipeline, self.layout.pp, length)
        return stages(self.model, num_stages(self.schedule, self.layout.pp, 1), length)

    @property
    def virtual_stages(self) -> int:
        """Return how many stages each pipeline rank holds; of DualPipe's two one belongs to each copy of the model."""
        return max(1, len(self.stages) // self.layout.pp)

    @property
    def micro_batches(self) -> int:
        """Return the micro-batches of a data rank in a step; of DualPipe's half enter at each end."""
        batch = self.settings.batch
        return max(1, batch.global_batch_size // (batch.micro_batch_size * self.layout.dp))

    @property
    def splits_backwards(self) -> bool:
        """Return whether weight gradients are left for later, if only until the end of a whole backward."""
        return self.layout.pp > 1 and self.schedule in SPLIT

    @property
    def pairs_at_once(self) -> bool:
        """Return whether the two runs of a pair may be at their peaks at once; in this project's engine they follow
        each other or take turns.
        """
        return self.engine.name != OURS.name or self.schedule == DUAL_PIPE

    @property
    def regathers(self) -> bool:
        """Return whether forwards free a stage's weights, and backwards gather them until the next forward."""
        return self.splits_backwards and self.freed_by_forwards

    @property
    def freed_by_forwards(self) -> bool:
        """Return whether each forward frees the weights that it has gathered."""
        return self.settings.run.sharding == "optim_grads_params" and self.engine.gradient_apart

    @property
    def exchanges(self) -> Exchanges:
        """Return how often a layer's run begins to exchange rows and leaves the turn to the other run of its pair. In
        FP8 codes and scales are exchanged one after the other; between nodes rows' weights and experts are, too.
        """
        communication, layout = self.settings.communication, self.layout
        if self.pairs_at_once or not communication.overlap_moe_expert_parallel_comm or layout.ep == 1:
            return Exchanges()
        parts, across, within = 1 + self.numbers.fp8, 0, 1
        if communication.moe_token_dispatcher_type == "grouped":
            nodes = nodes_of_experts(layout, communication.moe_ranks_per_node or layout.world_size)
            across, within = int(nodes > 1), int(layout.ep > nodes)
        return Exchanges(across * (parts + 2) + within * parts, within + across, across + within * parts,
                         within + 2 * across)

    def held(self, pp_rank: int) -> list[int]:
        """Return the stages of a pipeline rank."""
        return held_stages(self.schedule, self.layout.pp, self.virtual_stages, pp_rank)

    def actions(self, pp_rank: int) -> list[Act]:
        """Return what a pipeline rank does in a step."""
        return _actions(self.schedule, self.layout.pp, self.virtual_stages, self.micro_batches, pp_rank)

    @cached_property
    def numbers(self) -> Numbers:
        """Return in which numbers activations are kept."""
        run, base = self.settings.run, self.settings.base
        making = 0 if base is None or run.fp8_format is not None else MAKING[base.quantization_bit]
        return Numbers(2 if run.bf16 else 4, run.fp8_format is not None, self.cuda, making)

    def shapes(self, imbalance: float | None = None) -> LayerShapes:
        """Return one micro-batch as a layer sees it; `imbalance`: rows of the fullest expert rank over the mean, which
        forced balance and experts' capacity bound. Fine-tuning's rows are taken as one conversation each.
        """
        settings, loss, communication = self.settings, self.settings.loss, self.settings.communication
        even, capacity = loss.moe_router_force_load_balancing, loss.moe_expert_capacity_factor
        factor = self.imbalance if imbalance is None else imbalance
        factor = 1.0 if even else factor if capacity is None else min(factor, max(1.0, capacity))
        node = communication.moe_ranks_per_node or self.layout.world_size
        traffic = Traffic(communication.moe_token_dispatcher_type,
                          expected_nodes(self.model, self.layout, node, even), nodes_of_experts(self.layout, node),
                          factor, self.exchanges)
        return LayerShapes(self.model, self.layout, settings.batch.micro_batch_size, settings.data.seq_length,
                           self.numbers, traffic, loss.balance_type != "none", loss.balance_type == "seq_aux_loss",
                           settings.data.reset_attention_mask and settings.fine_tuning is None,
                           self.engine.weighs_before,
                           1.0 if capacity is None else min(1.0, capacity))

    def layers_of(self, stage: int) -> tuple[int, ...]:
        """Return the ids of a stage's layers, MTP modules among them, in the order in which they run."""
        held = self.stages[stage]
        return (*held.layers, *(self.model.num_hidden_layers + depth for depth in held.mtp))

    def modes_of(self, stage: int) -> tuple[LayerMode, ...]:
        """Return how each layer of a stage is run."""
        if self.layer_modes is not None:
            return self.layer_modes[stage]
        return modes(self.settings.recompute, self.settings.offload, len(self.layers_of(stage)))
