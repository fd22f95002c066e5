"""The layouts that a search tries: sizes of meshes, schedules, dispatchers, micro-batches, sharding, recomputation.

A `Lane` is all that decides what one layer takes of a rank's time; a `Choice` adds the pipeline, and what is kept,
recomputed or offloaded. Names of arguments are those of pretrain_deepseek.py; which of them go together is not known
here but for what schedule_rules.py says: the search asks arguments/validation.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel import schedule_rules
from megatron_deepseek.planning.layer_shapes import EXPERT_ACTIVATION, LAYERNORM, UP_PROJECTION
from megatron_deepseek.settings import OffloadSettings, RecomputeSettings

DISPATCHERS = ("alltoall", "grouped", "allgather")
SHARDINGS = ("optim_grads", "optim_grads_params")
TENSOR, CONTEXT, EXPERT_TENSOR, MICRO_BATCHES = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32), (1, 2, 4), (1, 2, 4)
FEWEST_TOKENS = 2048  # of a sequence on one context rank: with fewer it only waits for the others
PIPELINE_MOST, LOOPS = 32, (2, 3, 4)
SAME_BUT_FULLER = {"GPipe": "1F1B", "LoopedBFS": "Interleaved1F1B"}  # as long, and all micro-batches wait
_OFFLOAD_STEPS = 8  # numbers of offloaded layers that are tried between none and all of a stage


@dataclass(frozen=True, order=True)
class Lane:
    """What decides the time of a layer: ranks that share it, the dispatcher, sequences of a micro-batch."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dispatcher: str = "alltoall"
    micro_batch: int = 1


@dataclass(frozen=True, order=True)
class Choice:
    """A lane in a pipeline; `modules` are recomputed, all of them under "full"."""

    lane: Lane
    pp: int = 1
    virtual: int = 1
    schedule: str = "1F1B"
    sharding: str = SHARDINGS[0]
    granularity: str = ""
    modules: tuple[str, ...] = ()
    offloaded: int = 0

    @property
    def recompute(self) -> RecomputeSettings:
        """Return the settings of recomputation."""
        return RecomputeSettings(self.granularity or None, self.modules)

    @property
    def offload(self) -> OffloadSettings:
        """Return how many layers of each stage are offloaded."""
        return OffloadSettings(self.offloaded)


def lanes(model: ModelConfig, world_size: int, seq_length: int) -> Iterator[Lane]:
    """Yield all lanes of a model on so many ranks."""
    experts = model.n_routed_experts
    for tp in _dividing(TENSOR, world_size):
        for cp in CONTEXT:
            if world_size % (tp * cp) or (cp > 1 and (seq_length % (2 * cp) or seq_length // cp < FEWEST_TOKENS)):
                continue
            for ep in [size for size in range(1, experts + 1) if experts % size == 0] or [1]:
                for etp in EXPERT_TENSOR if experts else (1,):
                    if world_size % (ep * etp) == 0:
                        for micro_batch in MICRO_BATCHES:
                            for dispatcher in DISPATCHERS if ep > 1 else DISPATCHERS[:1]:
                                yield Lane(tp, cp, ep, etp, dispatcher, micro_batch)


def _dividing(sizes: tuple[int, ...], whole: int) -> list[int]:
    return [size for size in sizes if whole % size == 0]


def pipelines(model: ModelConfig, lane: Lane, world_size: int, batch: int) -> Iterator[tuple[int, int, str]]:
    """Yield (pp, stages of a rank, schedule) that take the micro-batches of a step of `batch` sequences."""
    for pp in [size for size in range(1, PIPELINE_MOST + 1) if world_size % size == 0]:
        inner = world_size // pp
        if inner % (lane.tp * lane.cp) or inner % (lane.ep * lane.etp):
            continue
        rows = lane.micro_batch * (inner // (lane.tp * lane.cp))
        if batch % rows:
            continue
        if pp == 1:
            yield 1, 1, "1F1B"
            continue
        for schedule, least in schedule_rules.VIRTUAL_STAGES.items():
            if schedule_rules.takes_microbatches(SAME_BUT_FULLER.get(schedule, ""), pp, batch // rows) and \
                    schedule in SAME_BUT_FULLER:
                continue
            counts = (1,) if least == 1 else LOOPS
            for virtual in counts:
                if (pp * virtual <= model.num_hidden_layers and schedule_rules.takes_virtual_stages(schedule, virtual)
                        and schedule_rules.takes_microbatches(schedule, pp, batch // rows)):
                    yield pp, virtual, schedule


def recomputes(model: ModelConfig) -> list[tuple[str, tuple[str, ...]]]:
    """Return (granularity, modules) of every way to recompute: none, each set of modules, whole layers."""
    modules = (LAYERNORM, UP_PROJECTION, *((EXPERT_ACTIVATION,) if model.n_routed_experts else ()))
    some = [("selective", each) for count in range(1, len(modules) + 1) for each in combinations(modules, count)]
    return [("", ()), *some, ("full", ())]


def offloads(layers: int) -> list[int]:
    """Return the numbers of layers to offload on stages of at most `layers`."""
    if layers <= _OFFLOAD_STEPS:
        return list(range(layers + 1))
    return sorted({round(layers * step / _OFFLOAD_STEPS) for step in range(_OFFLOAD_STEPS + 1)})


def options(choice: Choice, model: ModelConfig, ranks_per_node: int, layout: str | None = None) -> dict[str, Any]:
    """Return the values of all arguments that a choice decides, by their names in Python. Without a `layout` string the
    stages are left to be balanced.
    """
    lane, pp = choice.lane, choice.pp
    tokens_travel = lane.ep > 1 and lane.dispatcher != "allgather"
    pairs = choice.schedule == "DualPipeV" and pp > 1 and tokens_travel
    return {
        "tensor_model_parallel_size": lane.tp, "sequence_parallel": lane.tp > 1,
        "pipeline_model_parallel_size": pp, "context_parallel_size": lane.cp,
        "expert_model_parallel_size": lane.ep, "expert_tensor_parallel_size": lane.etp,
        "pipeline_schedule": choice.schedule if pp > 1 else None,
        "pipeline_model_parallel_layout": layout if pp > 1 else None,
        "num_virtual_stages_per_pipeline_rank": choice.virtual if pp > 1 and layout is None else None,
        "micro_batch_size": lane.micro_batch, "moe_token_dispatcher_type": lane.dispatcher,
        "moe_ranks_per_node": ranks_per_node if lane.dispatcher == "grouped" else None,
        "overlap_moe_expert_parallel_comm": pairs,
        "moe_shared_expert_overlap": tokens_travel and not pairs and model.n_shared_experts > 0,
        "data_parallel_sharding_strategy": choice.sharding,
        "recompute_granularity": choice.granularity or None,
        "recompute_modules": list(choice.modules) or None, "cpu_offloading_num_layers": choice.offloaded}


ALWAYS_SAID = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
               "micro_batch_size")


def words(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return arguments for a command line: those that are not the default, and the sizes that everyone looks for."""
    found: list[str] = []
    for name, value in values.items():
        if value is None or value is False or (value == defaults.get(name) and name not in ALWAYS_SAID):
            continue
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found += map(str, value) if isinstance(value, list) else [str(value)]
    return found
