"""The memory of every rank: what stands all the time, and the most that activations add, with the moment and the parts.

    static    weights, gathered weights, gradients, moments; receive buffers of the pipeline; a rollout engine's cache
    dynamic   the peak of the rank's action list (replay.py) over what its stages keep (stage_bytes.py)
    beyond    what the allocator does not count or wastes: CUDA's context, NCCL, fragments; a range (overheads.py)

Ranks of one pipeline rank are equal but for the rows that their experts get: those are a factor, and the report says
what several factors would mean.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.overheads import Range, overheads
from megatron_deepseek.planning.replay import Peak, replay
from megatron_deepseek.planning.stage_bytes import arrived, stage_bytes, terms_of_stage
from megatron_deepseek.planning.stage_states import passing
from megatron_deepseek.planning.state_bytes import Divided, StateParts, state_parts
from megatron_deepseek.planning.tasks import Task, extra_bytes, states_of_task, with_adapters, working_bytes

IMBALANCES = (1.0, 1.25, 2.0)  # rows of the fullest expert rank over the mean
PRETRAIN = Task()
FITS, TIGHT, OOM = "fits", "tight", "oom"


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of each rank of pipeline rank `pp_rank`, as an allocator counts them at the worst moment.

    The worst moment is in act `peak.act`. `states` are those of that moment; `receive`: activations and gradients that
    have arrived by then; `activations`: all that is kept, waits or exists only in that act, sums that a first backward
    has made so far among it; `beyond` is what comes on top of all that. `host`: bytes in the host's memory for each
    rank.
    """

    pp_rank: int
    states: StateParts
    receive: float
    activations: float
    peak: Peak
    beyond: Range
    host: float
    extra: Mapping[str, float]

    @property
    def peak_bytes(self) -> float:
        """Return the most that is allocated."""
        return self.states.device + self.receive + self.activations + sum(self.extra.values())

    @property
    def low(self) -> float:
        """Return the least that the GPU must have."""
        return self.peak_bytes + self.beyond.low

    @property
    def high(self) -> float:
        """Return what the GPU may need."""
        return self.peak_bytes + self.beyond.high


def rank_memory(job: Job, pp_rank: int, imbalance: float = 1.0, task: Task = PRETRAIN) -> RankMemory:
    """Return the memory of the ranks of one pipeline rank."""
    job = with_adapters(job, task)
    extra = extra_bytes(job, task, pp_rank)
    most = states_of_task(job, task, pp_rank, state_parts(job, pp_rank))
    if not task.trains:
        working = working_bytes(job, imbalance)
        beyond = overheads(job, most.device + working + sum(extra.values()))
        return RankMemory(pp_rank, most, 0.0, working, Peak(round(working), running=round(working)), beyond,
                          most.host, extra)
    shapes, held = job.shapes(imbalance), job.held(pp_rank)
    stages = {stage: stage_bytes(job, stage, shapes) for stage in held}
    peak = replay(job.actions(pp_rank), {stage: each.replayed for stage, each in stages.items()}, job.pairs_at_once,
                  arrived(job, pp_rank), job.regathers)
    states, activations = states_at(job, most, peak), peak.bytes - peak.states - peak.arrived - peak.gathered
    allocated = states.device + peak.arrived + activations + sum(extra.values())
    host = most.host + sum(stages[stage].host * count for stage, count in peak.in_flight.items())
    return RankMemory(pp_rank, states, peak.arrived, activations, peak, overheads(job, allocated), host, extra)


def states_at(job: Job, most: StateParts, peak: Peak) -> StateParts:
    """Return the states of a rank at its peak; `most` are those that it has at their most."""
    if not job.engine.gradient_apart:
        return most
    parts = [passing(job, stage, phase) for stage, phase in peak.phases.items()]
    gathered = sum((each.gathered for each in parts), Divided(peak.gathered))
    reduced = most.reduced if most.on_host else sum((each.reduced for each in parts), Divided())
    return replace(most, gathered=gathered, gradients=sum((each.sums for each in parts), Divided()), reduced=reduced)


def all_ranks(job: Job, imbalance: float = 1.0, task: Task = PRETRAIN) -> list[RankMemory]:
    """Return the memory of each pipeline rank's ranks, in order."""
    return [rank_memory(job, pp_rank, imbalance, task) for pp_rank in range(job.layout.pp)]


def worst(ranks: list[RankMemory]) -> RankMemory:
    """Return the one that needs most."""
    return max(ranks, key=lambda each: each.high)


def verdict(ranks: list[RankMemory], gpu: Gpu, limit: float | None = None) -> str:
    """Return whether all ranks fit: FITS if what the fullest may need is there, OOM if even the least is not."""
    available = gpu.memory_bytes if limit is None else limit
    if max(each.low for each in ranks) > available:
        return OOM
    return FITS if max(each.high for each in ranks) <= available else TIGHT


def largest_terms(job: Job, memory: RankMemory, imbalance: float = 1.0) -> Iterator[tuple[str, float]]:
    """Yield (what it is, bytes) of all that a rank holds at its peak, the largest first."""
    shapes = job.shapes(imbalance)
    found = {name: size for name, size in memory.states.terms() if size}
    found |= {name: size for name, size in memory.extra.items() if size}
    if memory.receive:
        found["receive buffers of the pipeline"] = memory.receive
    for stage, count in memory.peak.in_flight.items():
        for name, size in terms_of_stage(job, stage, shapes):
            key = f"kept: {name}"
            found[key] = found.get(key, 0.0) + count * size
    found["kept for later weight gradients"] = memory.peak.waiting
    found["while the layer at the peak runs"] = memory.peak.running - memory.peak.gathered
    yield from sorted(((name, size) for name, size in found.items() if size), key=lambda pair: -pair[1])
