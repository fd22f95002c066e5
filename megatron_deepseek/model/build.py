"""Build this rank's stages from an architecture and a layout: on the meta device, then sharded, then initialised.

No rank ever holds more of a parameter than its own shard.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_deepseek.device import is_accelerator, make_stream
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.balance_loss import BalanceWeights
from megatron_deepseek.model.base_weights import hold_base
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.capacity import Capacity
from megatron_deepseek.model.compiled import compile_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.frozen import freeze
from megatron_deepseek.model.init import initialize
from megatron_deepseek.model.layer import choose_run
from megatron_deepseek.model.lora import add_adapters, freeze_base
from megatron_deepseek.model.moe import MoE
from megatron_deepseek.model.router import Router
from megatron_deepseek.ops.fp8 import recipe as fp8_recipe
from megatron_deepseek.ops.precision_recipe import Grouped, PrecisionRecipe
from megatron_deepseek.ops.recompute import kept, recomputed
from megatron_deepseek.ops.side_stream import RunInLine, RunOnSideStream
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.data import Unit, shard_over_data
from megatron_deepseek.parallel.expert import AllToAllDispatcher, Dispatcher, unchanged
from megatron_deepseek.parallel.expert_gather import AllGatherDispatcher
from megatron_deepseek.parallel.expert_grouped import GroupedDispatcher
from megatron_deepseek.parallel.expert_tensor import ExpertTensorParallel
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.nodes import CommunicationCounter, build_levels
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.settings import (
    BaseSettings,
    CommunicationSettings,
    LoraSettings,
    LossSettings,
    OffloadSettings,
    RecomputeSettings,
)


@dataclass(frozen=True)
class Precision:
    """The dtypes that a model is trained in.

    `master`: of weights, gradients and moments; `compute`: what layers run in, None for the master's. `fp8`: compute
    the GEMMs of attention, MLP and experts by the FP8 recipe (ops/fp8/recipe.py); `fp8_gather`: gather their weights
    over data ranks as FP8.
    """

    master: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    fp8: bool = False
    fp8_gather: bool = False

    @property
    def activations(self) -> torch.dtype:
        return self.compute or self.master


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How the stages of a model are built, apart from the architecture, the layout and the sequence length.

    `frozen`: wildcard patterns over the names of parameters that are not trained (model/frozen.py). `lora`: adapters
    that alone are trained, None to train the weights (model/lora.py); `base`: in which form the weights beside them are
    kept, None for plain numbers (model/base_weights.py). `compiler`: the backend of torch.compile by which functions of
    the layers become graphs (model/compiled.py), None for none.
    """

    precision: Precision = Precision()
    loss: LossSettings = LossSettings()
    recompute: RecomputeSettings = RecomputeSettings()
    communication: CommunicationSettings = CommunicationSettings()
    offload: OffloadSettings = OffloadSettings()
    reshard_after_forward: bool = False
    frozen: tuple[str, ...] = ()
    lora: LoraSettings | None = None
    base: BaseSettings | None = None
    compiler: str | None = None
    seed: int = 1234


def build_stages(config: ModelConfig, mine: Iterable[Stage], meshes: Meshes, seq_length: int,
                 options: BuildOptions = BuildOptions()) -> list[DeepseekStage]:
    """Return the stages `mine` of this rank, ready to train."""
    stages = sharded_stages(config, mine, meshes, seq_length, options)
    place_stages(stages, meshes, options)
    initialize(stages, config.initializer_range, options.seed)
    if options.compiler is not None:
        compile_stages(stages, options.compiler, meshes.device)
    return stages


def sharded_stages(config: ModelConfig, mine: Iterable[Stage], meshes: Meshes, seq_length: int,
                   options: BuildOptions = BuildOptions()) -> list[DeepseekStage]:
    """Return the stages `mine` of this rank on the meta device, sharded over all ranks."""
    stages = shape_stages(config, mine, meshes, seq_length, options)
    freeze(stages, options.frozen)
    if options.lora is not None:
        freeze_base(stages, options.precision.activations)
    shard_stages(stages, meshes, options)
    return stages


def place_stages(stages: Iterable[DeepseekStage], meshes: Meshes, options: BuildOptions = BuildOptions()) -> None:
    """Give the shards of `stages` memory where they are kept."""
    for stage in stages:
        stage.to_empty(device="cpu" if options.offload.optimizer_cpu_offload else meshes.device)
        move_buffers(stage, meshes.device)


def shard_stages(stages: Iterable[DeepseekStage], meshes: Meshes, options: BuildOptions = BuildOptions()) -> None:
    """Shard stages over the data ranks too, on the device where they are: on the meta device that takes no memory."""
    for stage in stages:
        shard_over_data(units(stage, meshes, options.precision), options.reshard_after_forward,
                        options.offload.optimizer_cpu_offload)


def shape_stages(config: ModelConfig, mine: Iterable[Stage], meshes: Meshes, seq_length: int,
                 options: BuildOptions = BuildOptions()) -> list[DeepseekStage]:
    """Return the stages on the meta device, sharded over TP and EP but not data ranks: for inference and planning."""
    blueprint = make_blueprint(config, meshes, options)
    run_of = partial(choose_run, options.recompute, options.offload)
    with torch.device("meta"), default_dtype(options.precision.master):
        stages = [DeepseekStage(stage, blueprint, seq_length, meshes.device, run_of, options.loss.loss_chunk_size)
                  for stage in mine]
        if options.base is not None:
            hold_base(stages, config, options.base, meshes.layout, blueprint.tp)
        if options.lora is not None:
            add_adapters(stages, config, options.lora, blueprint.tp)
        return stages


def shape_whole(config: ModelConfig, meshes: Meshes, max_length: int, dtype: torch.dtype,
                lora: LoraSettings | None = None, base: BaseSettings | None = None) -> DeepseekStage:
    """Return the whole model on the meta device, divided over TP and EP, MTP modules included.

    `lora` and `base` are as in BuildOptions. Routers, and the biases that steer them, keep float32, as in training.
    """
    whole = Stage(embedding=True, layers=tuple(range(config.num_hidden_layers)),
                  mtp=tuple(range(config.num_nextn_predict_layers)), loss=True)
    (stage,) = shape_stages(config, [whole], meshes, max_length,
                            BuildOptions(precision=Precision(dtype), lora=lora, base=base))
    wide = torch.promote_types(dtype, torch.float32)
    for module in stage.modules():
        if isinstance(module, Router):
            module.to(wide)
    return stage


def make_blueprint(config: ModelConfig, meshes: Meshes, options: BuildOptions = BuildOptions()) -> Blueprint:
    """Return what every layer is built from, with the groups and streams that the layers share."""
    loss, recompute, communication = options.loss, options.recompute, options.communication
    recipe = make_precision_recipe(options.precision, recompute, meshes.layout.tp)
    overlap = MicroBatchOverlap()
    counter = CommunicationCounter(communication.moe_ranks_per_node or meshes.layout.world_size)
    etp = ExpertTensorParallel(meshes.experts, counter)
    dispatcher = None
    if config.n_routed_experts:
        dispatcher = make_dispatcher(config.n_routed_experts, meshes, communication.moe_token_dispatcher_type, overlap,
                                     etp, recipe.to_experts)
    return Blueprint(
        config=config,
        tp=TensorParallel(meshes.tp, meshes.layout.sequence_parallel),
        cp=ContextParallel(meshes.cp, communication.cp_comm_type),
        sequence_group=meshes.sequence.get_group() if meshes.sequence.size() > 1 else None,
        dispatcher=dispatcher,
        etp=etp,
        balance=make_balance(loss),
        recomputed=recomputed_modules(recompute),
        forced_balance=loss.moe_router_force_load_balancing,
        recipe=recipe,
        capacity=make_capacity(config, loss),
        side_stream=make_side_stream(communication, meshes.device),
        overlap=overlap)


def make_balance(loss: LossSettings) -> BalanceWeights:
    if loss.balance_type == "none":
        return BalanceWeights()
    return BalanceWeights(loss.moe_aux_loss_coeff, loss.moe_device_aux_loss_coeff,
                          loss.moe_communication_aux_loss_coeff, loss.balance_type == "seq_aux_loss")


def recomputed_modules(recompute: RecomputeSettings) -> frozenset[str]:
    return frozenset(recompute.modules if recompute.granularity == "selective" else ())


def make_precision_recipe(precision: Precision, recompute: RecomputeSettings, tp: int) -> PrecisionRecipe:
    """Return the GEMMs of a model.

    The FP8 recipe never saves SwiGLU's output; otherwise that of the experts is saved unless `moe_act` is recomputed.
    Where norms are recomputed, so are the FP8 tiles of their output, unless TP has gathered the norm's output.
    """
    again = recomputed_modules(recompute)
    if precision.fp8:
        return fp8_recipe.recipe(recomputed if "layernorm" in again and tp == 1 else kept, precision.fp8_gather)
    return PrecisionRecipe(experts_down=Grouped(activate=recomputed)) if "moe_act" in again else PrecisionRecipe()


def make_capacity(config: ModelConfig, loss: LossSettings) -> Capacity | None:
    factor = loss.moe_expert_capacity_factor
    return None if factor is None else Capacity(factor, loss.moe_token_drop_policy, config.n_routed_experts)


def make_side_stream(communication: CommunicationSettings, device: torch.device) -> Callable[[], RunInLine]:
    """Return what makes a layer's side stream: one stream for all, in order; each layer waits for its own work."""
    if communication.moe_shared_expert_overlap and is_accelerator(device):
        return partial(RunOnSideStream, make_stream(device))
    return RunInLine


def make_dispatcher(num_experts: int, meshes: Meshes, kind: str, overlap: MicroBatchOverlap,
                    etp: ExpertTensorParallel, to_experts: Callable[[torch.Tensor], torch.Tensor] = unchanged
                    ) -> Dispatcher:
    common = meshes.ep, num_experts, etp.counter
    if kind == "grouped":
        levels = build_levels(meshes.layout, meshes.device, etp.counter.ranks_per_node)
        return GroupedDispatcher(*common, overlap, levels, to_experts, etp.counts)
    if kind == "allgather":
        return AllGatherDispatcher(*common, to_experts, etp.counts)
    return AllToAllDispatcher(*common, overlap, to_experts, etp.counts)


def units(stage: DeepseekStage, meshes: Meshes, precision: Precision) -> Iterator[Unit]:
    """Yield the FSDP units of a stage, inner before outer: experts on their mesh, routers in full precision, layers."""
    for layer in stage.model.layers.values():
        if isinstance(layer.mlp, MoE):
            yield Unit(layer.mlp.experts, meshes.expert_fsdp, precision.compute)
            if precision.compute is not None:
                yield Unit(layer.mlp.gate, meshes.dense_fsdp)
        yield Unit(layer, meshes.dense_fsdp, precision.compute)
    yield Unit(stage, meshes.dense_fsdp, precision.compute)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move buffers to `device`: the forward uses them as they are, wherever FSDP keeps the shards of parameters."""
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            setattr(each, name, buffer.to(device))


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Make `dtype` the dtype of parameters created in a `with` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
