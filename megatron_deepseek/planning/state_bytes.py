"""Weights, gradients and moments of a rank, by part, for an engine; dense parameters and routed experts by themselves,
since different numbers of ranks divide them.

Ours: a parameter takes 4 bytes for its master weight, 4 for its reduced gradient and 8 for AdamW's two moments (4 with
moments in bfloat16). FSDP divides these among the data ranks; with --optimizer-cpu-offload they lie in the host's
memory. Not divided are 2 bytes for the gathered bfloat16 weight (4 without --bf16 and of routers; FP8 takes two codes)
and, where an update has several micro-batches, or one whose weight gradients a schedule makes apart, 4 for the sum of
their gradients, since they are reduced once. That is done layer by layer in the last backward: the sum is freed before
the next layer's is reduced, and the reduced gradient is freed before the next update's sums begin, so that the two
never add up on a device. With optim_grads_params weights are gathered for the embedding and the head, which every
micro-batch begins and ends with, and two layers: the one in use and the next, but for routed experts. A frozen weight
beside adapters takes what it is kept as, and as much when it is gathered.

Where data ranks do not divide a parameter's rows evenly, what is counted is the first rank's part, which is as large as
any, and of gathered weights that of all ranks.

tests/parallel/test_state_memory.py counts all of it through steps of several layouts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.binary_units import with_unit
from megatron_deepseek.planning.held_parameters import (
    Held,
    Kept,
    gathered_adapters,
    held_adapters,
    held_base,
    held_outside,
    held_parameters,
)
from megatron_deepseek.planning.job import Job
from megatron_deepseek.settings import Settings

_MASTER = 4  # bytes of a master weight in this engine


@dataclass(frozen=True)
class Divided:
    """Bytes of dense parameters and of routed experts."""

    dense: float = 0.0
    experts: float = 0.0

    @property
    def all(self) -> float:
        """Return their sum."""
        return self.dense + self.experts

    def __add__(self, other: "Divided") -> "Divided":
        return Divided(self.dense + other.dense, self.experts + other.experts)


@dataclass(frozen=True)
class StateParts:
    """`weights`: what lies there all the time (masters, or the engine's own); `gathered`: whole weights that layers
    compute with; `gradients`: sums, whole and divided; `optimizer`: moments, and masters that are not the weights.
    `on_host`: weights (masters), divided gradients and moments lie in the host's memory; `gradients_on_host`: so do
    the sums of `gradients`, where they are divided too.
    """

    weights: Divided
    gathered: Divided
    gradients: Divided
    reduced: Divided
    optimizer: Divided
    on_host: bool = False
    gradients_on_host: bool = False

    @property
    def device(self) -> float:
        """Return the bytes on the device."""
        here = self.gathered.all + (0 if self.gradients_on_host else self.gradients.all)
        return here if self.on_host else here + self.weights.all + self.reduced.all + self.optimizer.all

    @property
    def host(self) -> float:
        """Return the bytes in the host's memory."""
        if not self.on_host:
            return 0.0
        gradients = self.gradients.all if self.gradients_on_host else 0
        return self.weights.all + self.reduced.all + self.optimizer.all + gradients

    def terms(self) -> Iterator[tuple[str, float]]:
        """Yield (name, bytes) of what is on the device."""
        named = [("gathered weights", self.gathered)]
        if not self.gradients_on_host:
            named.append(("gradients", self.gradients))
        if not self.on_host:
            named += [("weights", self.weights), ("reduced gradients", self.reduced), ("optimizer", self.optimizer)]
        for name, part in named:
            yield f"{name}: dense", part.dense
            yield f"{name}: experts", part.experts


@dataclass(frozen=True)
class StateBytes:
    """Bytes on each rank of the pipeline rank `pp_rank`, on the device and in the host's memory."""

    pp_rank: int
    device: float
    host: float


def fullest_states(settings: Settings) -> StateBytes:
    """Return the states of the pipeline rank with the most on its device, in this project's engine."""
    job = Job(settings)
    of_ranks = ((pp_rank, state_parts(job, pp_rank)) for pp_rank in range(job.layout.pp))
    return max((StateBytes(pp_rank, parts.device, parts.host) for pp_rank, parts in of_ranks),
               key=lambda each: each.device)


def describe_states(settings: Settings) -> str:
    """Return a line on what the fullest GPU holds."""
    most = fullest_states(settings)
    host = f", {with_unit(most.host)} of the host's memory for each rank" if most.host else ""
    return (f"weights, gradients and moments (calculated, docs/quickstart_cluster.md): at most "
            f"{with_unit(most.device)} on a GPU, of pipeline rank {most.pp_rank}{host}")


def state_parts(job: Job, pp_rank: int) -> StateParts:
    """Return the states of each rank of a pipeline rank."""
    held = held_parameters(job.model, job.layout, [job.stages[stage] for stage in job.held(pp_rank)])
    if job.engine.name == "ours":
        return _ours(job, held, pp_rank) if job.settings.lora is None else adapter_parts(job, pp_rank)
    return _others(job, held, pp_rank)


def standing_states(job: Job, pp_rank: int) -> float:
    """Return the bytes of states that are on the device all the time: in this project's engine those that do not come
    and go with the acts of their stage (stage_states.py).
    """
    parts = state_parts(job, pp_rank)
    if not job.engine.gradient_apart:
        return parts.device
    return replace(parts, gathered=Divided(), gradients=Divided(), reduced=Divided()).device


def _of(held: Held, dense: float, experts: float) -> Divided:
    return Divided(held.dense * dense, held.experts * experts)


def data_ranks(job: Job) -> tuple[int, int]:
    """Return among how many ranks dense parameters and routed experts are divided."""
    layout = job.layout
    return layout.dp * layout.cp, layout.edp


def _ours(job: Job, held: Held, pp_rank: int) -> StateParts:
    """Return FSDP2's: float32 shards, reduced gradients and moments divided; weights gathered for the step, or unit by
    unit; sums of several micro-batches' gradients whole.
    """
    settings, engine = job.settings, job.engine
    dense, experts = data_ranks(job)
    optimizer = settings.optimizer
    moments = sum(2 if dtype == "bf16" else 4 for dtype in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    stages = [job.stages[stage] for stage in job.held(pp_rank)]
    trained = _trained(settings, held, job, stages)
    return StateParts(
        weights=_of(held.padded, engine.master / dense, engine.master / experts),
        gathered=_gathered(job, stages), **_gradients(job, trained),
        optimizer=_of(trained.padded, moments / dense, moments / experts),
        on_host=settings.offload.optimizer_cpu_offload)


def _gradients(job: Job, trained: Held) -> dict[str, Divided]:
    """Return the whole sums of gradients and the reduced ones. On a device they take turns; in the host's memory the
    reduced ones are beside moments and masters alone. Sums of all stages of a rank are taken to meet, which with
    LoopedBFS is an upper bound.
    """
    (dense, experts), engine = data_ranks(job), job.engine
    sums = engine.gradient if job.micro_batches > 1 or job.splits_backwards else 0
    reduced = engine.reduced if not sums or job.settings.offload.optimizer_cpu_offload else 0
    return {"gradients": _of(trained, sums, sums), "reduced": _of(trained.padded, reduced / dense, reduced / experts)}


def _trained(settings: Settings, held: Held, job: Job, stages: Sequence[Stage]) -> Held:
    """Return what has gradients and moments of the parameters that a rank holds: all, or not what is frozen."""
    frozen = settings.run.freeze_parameters
    return held if not frozen else held_parameters(job.model, job.layout, stages, frozen)


def adapter_parts(job: Job, pp_rank: int) -> StateParts:
    """Return the states of this project's engine where adapters alone are trained, those of the settings' `lora`."""
    optimizer, stages = job.settings.optimizer, [job.stages[stage] for stage in job.held(pp_rank)]
    dense, experts = data_ranks(job)
    moments = sum(2 if dtype == "bf16" else 4 for dtype in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    base = base_bytes(job, stages).padded
    trained = held_adapters(job.model, job.layout, stages, job.settings.lora)
    adapters = trained.padded
    return StateParts(
        weights=Divided((base.dense + _MASTER * adapters.dense) / dense,
                        (base.experts + _MASTER * adapters.experts) / experts),
        gathered=_gathered(job, stages), **_gradients(job, trained),
        optimizer=_of(adapters, moments / dense, moments / experts),
        on_host=job.settings.offload.optimizer_cpu_offload)


def base_bytes(job: Job, stages: Sequence[Stage]) -> Held:
    """Return the bytes of the frozen weights of `stages` on a rank, before data ranks divide them."""
    return held_base(job.model, job.layout, stages, _kept(job))


def _kept(job: Job) -> Kept:
    """Return the bytes of numbers that layers compute with: routers compute in float32."""
    return Kept(job.numbers.element, _MASTER, job.settings.base)


def _gathered(job: Job, stages: Sequence[Stage]) -> Divided:
    """Return the bytes of the weights that are gathered at once, adapters among them, in the layers' dtype.

    By the layer it is two layers of a stage, since a backward asks for the one before, and one layer's routed experts,
    which are a unit by themselves. While a unit is unpacked it is there twice, as routed experts are beside the
    gradients of their weights, which are as large. Schedules that make weight gradients apart leave a stage gathered
    from one backward to the next.
    """
    if gathered_for_the_step(job):
        return gathered_weights(job, stages)
    outside, experts = held_outside(job.model, job.layout, stages, _kept(job)).padded.dense, 2 if job.frozen_base else 1
    most = Divided()
    for units in ([gathered_weights(job, [layer], outside=False) for layer in layers_of([stage])] for stage in stages):
        for one, two in zip(units, [*units[1:], Divided()]):
            both = Divided(one.dense + two.dense, experts * max(one.experts, two.experts))
            most = max(most, both, key=lambda each: each.all)
    return Divided(outside + most.dense, most.experts)


def gathered_for_the_step(job: Job) -> bool:
    """Return whether weights stay gathered from a stage's first forward to its last backward."""
    return job.settings.run.sharding == "optim_grads" or job.splits_backwards


def gathered_weights(job: Job, stages: Sequence[Stage], outside: bool = True) -> Divided:
    """Return the bytes of the gathered weights of `stages`, with or without those that are in none of the layers."""
    base, kept = base_bytes(job, stages).padded, _kept(job)
    dense = base.dense - (0 if outside else held_outside(job.model, job.layout, stages, kept).padded.dense)
    if job.settings.lora is None:
        return Divided(dense, base.experts)
    adapters = gathered_adapters(job.model, job.layout, stages, job.settings.lora, kept).padded
    return Divided(dense + adapters.dense, base.experts + adapters.experts)


def _others(job: Job, held: Held, pp_rank: int) -> StateParts:
    engine, (dense, experts) = job.engine, data_ranks(job)

    def part(size: float, divides: bool) -> Divided:
        return _of(held, size / (dense if divides else 1), size / (experts if divides else 1))

    on_host = engine.host or job.settings.offload.optimizer_cpu_offload
    gathered = Divided() if engine.gathers is None else largest_unit(
        job, pp_rank, engine.weight, 1 if on_host else engine.gathers)
    return StateParts(
        weights=part(engine.weight, engine.divides_weights), gathered=gathered,
        gradients=part(engine.gradient, engine.divides_gradients), reduced=Divided(),
        optimizer=part(engine.master + engine.moments, engine.divides_optimizer),
        on_host=on_host, gradients_on_host=on_host and engine.divides_gradients)


def largest_unit(job: Job, pp_rank: int, size: float, count: int) -> Divided:
    """Return the bytes of the largest unit that is gathered at once, `count` times: one in use, the next on its way."""
    units = [held_parameters(job.model, job.layout, [part]) for part in units_of(job, pp_rank)]
    most = max(units, key=lambda unit: unit.dense + unit.experts)
    return _of(most, size * count, size * count)


def units_of(job: Job, pp_rank: int) -> list[Stage]:
    """Return each layer of a pipeline rank, and what its stages hold beside layers, as stages of their own."""
    held = [job.stages[stage] for stage in job.held(pp_rank)]
    layers = [Stage(False, (index,), (), False) for stage in held for index in stage.layers]
    return layers + [Stage(stage.embedding, (), stage.mtp, stage.loss) for stage in held]


def layers_of(stages: Sequence[Stage]) -> list[Stage]:
    """Return each layer and each MTP module of `stages` as a stage of its own."""
    return [one for stage in stages for one in (*(Stage(False, (index,), (), False) for index in stage.layers),
                                                *(Stage(False, (), (depth,), False) for depth in stage.mtp))]
