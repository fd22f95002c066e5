"""The memory of a job in words, as a table of equal ranks, and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import (
    FITS,
    IMBALANCES,
    OOM,
    PRETRAIN,
    RankMemory,
    all_ranks,
    largest_terms,
    verdict,
    worst,
)
from megatron_deepseek.planning.state_bytes import StateParts
from megatron_deepseek.planning.tasks import Task
from megatron_deepseek.planning.words import aligned, in_short, parts_of_stage

GIB = 2**30
_KINDS = {"F": "forward", "B": "backward", "I": "gradient of the inputs", "W": "gradient of the weights"}
_SHOWN_TERMS = 3


@dataclass(frozen=True)
class MemoryPlan:
    """A job's ranks with balanced experts, and with each other factor of imbalance that says something."""

    job: Job
    gpu: Gpu
    limit: float
    ranks: list[RankMemory]
    uneven: dict[float, list[RankMemory]]
    task: Task = PRETRAIN

    @property
    def worst(self) -> RankMemory:
        """Return the pipeline rank that needs most."""
        return worst(self.ranks)

    @property
    def verdict(self) -> str:
        """Return the verdict of balanced experts, or TIGHT where some fits only if they are."""
        balanced = verdict(self.ranks, self.gpu, self.limit)
        slightly = self.uneven.get(1.25, self.ranks)
        return balanced if balanced == OOM or verdict(slightly, self.gpu, self.limit) == FITS else "tight"

    @property
    def worst_rank(self) -> int:
        """Return the first rank of the job that needs most."""
        return self.worst.pp_rank * ranks_each(self.job)


def plan_memory(job: Job, gpu: Gpu, limit: float | None = None, task: Task = PRETRAIN) -> MemoryPlan:
    """Return the memory of every rank of `job` on `gpu`s, of which `limit` bytes may be used (all).

    Experts' rows are uneven only where a dropless router sends them to several ranks.
    """
    job = replace(job, frozen_base=task.name in ("lora", "qlora"))
    dropless = job.layout.ep > 1 and job.model.n_routed_experts and not (
        job.settings.loss.moe_router_force_load_balancing)
    factors = [factor for factor in IMBALANCES if factor != 1.0] if dropless else []
    return MemoryPlan(job, gpu, gpu.memory_bytes if limit is None else limit, all_ranks(job, 1.0, task),
                      {factor: all_ranks(job, factor, task) for factor in factors}, task)


def ranks_each(job: Job) -> int:
    """Return how many ranks one pipeline rank has."""
    return job.layout.world_size // job.layout.pp


def lines(plan: MemoryPlan) -> Iterator[str]:
    """Yield the report: what was planned, the table, the worst rank and its moment, imbalance, the verdict."""
    job, gpu = plan.job, plan.gpu
    layout = job.layout
    yield (f"{layout.world_size} x {gpu.name} of {gpu.memory_bytes / GIB:.1f} GiB"
           + (f" ({plan.limit / GIB:.1f} GiB may be used)" if plan.limit != gpu.memory_bytes else "")
           + f", {plan.task.name}, engine {job.engine.name}: pp {layout.pp} x dp {layout.dp} x cp {layout.cp} x tp "
           f"{layout.tp}, experts edp {layout.edp} x ep {layout.ep} x etp {layout.etp}"
           + (f", {job.schedule}" if layout.pp > 1 else "") + f", {job.micro_batches} micro-batches")
    yield ""
    yield from table(plan)
    yield ""
    yield from worst_lines(plan)
    yield ""
    yield from imbalance_lines(plan)
    yield f"verdict: {plan.verdict}"


def table(plan: MemoryPlan) -> Iterator[str]:
    """Yield a line for pipeline ranks that follow each other and are alike."""
    each = ranks_each(plan.job)
    rows = [("pipeline ranks", "ranks", "GiB: weights", "gathered", "gradients", "optimizer", "activations", "receive",
             "peak", "needs", "holds")]
    for _, run in groupby(plan.ranks, lambda rank: tuple(f"{part:.1f}" for part in _parts(rank))):
        alike = list(run)
        first, last = alike[0].pp_rank, alike[-1].pp_rank
        rows.append((in_short([rank.pp_rank for rank in alike]), in_short(range(first * each, (last + 1) * each)),
                     *(f"{part:.1f}" for part in _parts(alike[0])),
                     f"{alike[0].low / GIB:.1f}-{alike[0].high / GIB:.1f}", _holds(plan.job, alike)))
    yield from aligned(rows)
    yield ("needs: with CUDA's context, NCCL's buffers and fragments, of which nobody knows more than a range; "
           "weights: what stays, gathered: whole for the layers")


def _parts(rank: RankMemory) -> tuple[float, ...]:
    states = rank.states
    here = not states.on_host
    parts = (states.weights.all * here + sum(rank.extra.values()), states.gathered.all, gradients_here(states),
             states.optimizer.all * here, rank.activations, rank.receive, rank.peak_bytes)
    return tuple(part / GIB for part in parts)


def gradients_here(states: StateParts) -> float:
    """Return the bytes of gradients on the device."""
    return states.gradients.all * (not states.gradients_on_host) + states.reduced.all * (not states.on_host)


def _holds(job: Job, alike: Sequence[RankMemory]) -> str:
    texts = [" | ".join(parts_of_stage(job.model, job.stages[stage]) for stage in job.held(rank.pp_rank))
             for rank in (alike[0], alike[-1])]
    return texts[0] if len(alike) == 1 else f"{texts[0]} ... {texts[1]}"


def worst_lines(plan: MemoryPlan) -> Iterator[str]:
    """Yield which rank needs most, at which moment, and its largest terms."""
    job, most = plan.job, plan.worst
    if not plan.task.trains:
        yield f"worst: rank {plan.worst_rank} (pipeline rank {most.pp_rank}), {most.peak_bytes / GIB:.1f} GiB allocated"
        yield from _terms(plan)
        return
    acts = job.actions(most.pp_rank)
    act = acts[most.peak.act]
    doing = " beside ".join(f"{_KINDS[run.kind]} of micro-batch {run.micro_batch} on stage {run.stage}" for run in act)
    flying = ", ".join(f"{count} on stage {stage}" for stage, count in most.peak.in_flight.items())
    yield (f"worst: rank {plan.worst_rank} (pipeline rank {most.pp_rank}), {most.peak_bytes / GIB:.1f} GiB allocated "
           f"in act {most.peak.act + 1} of {len(acts)}: {doing}")
    yield f"  forwards that wait for their backward there: {flying or 'none'}"
    yield from _terms(plan)
    if most.host:
        yield f"  {most.host / GIB:8.1f} GiB of the host's memory for each rank"


def _terms(plan: MemoryPlan) -> Iterator[str]:
    for name, size in list(largest_terms(plan.job, plan.worst))[:_SHOWN_TERMS]:
        yield f"  {size / GIB:8.1f} GiB  {name}"


def imbalance_lines(plan: MemoryPlan) -> Iterator[str]:
    """Yield what the fullest expert rank would need if its rows were so many times the mean."""
    if not plan.uneven:
        return
    for factor, ranks in {1.0: plan.ranks, **plan.uneven}.items():
        most = worst(ranks)
        yield (f"rows of the fullest expert rank x {factor:g}: {most.peak_bytes / GIB:.1f} GiB allocated on rank "
               f"{most.pp_rank * ranks_each(plan.job)}, needs {most.low / GIB:.1f} to {most.high / GIB:.1f}: "
               f"{verdict(ranks, plan.gpu, plan.limit)}")


def as_json(plan: MemoryPlan) -> dict:
    """Return the plan for --json: every rank with its parts in bytes."""
    each = ranks_each(plan.job)
    return {"engine": plan.job.engine.name, "gpu": plan.gpu.name, "gpu_bytes": plan.gpu.memory_bytes,
            "limit_bytes": int(plan.limit),
            "ranks": [_rank_json(plan.ranks[rank // each], rank) for rank in range(plan.job.layout.world_size)],
            "worst_rank": plan.worst_rank, "verdict": plan.verdict,
            "largest_terms": [{"name": name, "bytes": round(size)}
                              for name, size in list(largest_terms(plan.job, plan.worst))[:_SHOWN_TERMS]],
            "imbalance": [{"factor": factor, "peak_bytes": round(worst(ranks).peak_bytes),
                           "verdict": verdict(ranks, plan.gpu, plan.limit)}
                          for factor, ranks in {1.0: plan.ranks, **plan.uneven}.items()]}


def _rank_json(memory: RankMemory, rank: int) -> dict:
    states = memory.states
    here = not states.on_host
    parts = {"peak_bytes": memory.peak_bytes, "weights_bytes": states.weights.all * here,
             "gathered_bytes": states.gathered.all, "gradient_bytes": gradients_here(states),
             "optimizer_bytes": states.optimizer.all * here, "activation_bytes": memory.activations,
             "receive_bytes": memory.receive, "other_bytes": sum(memory.extra.values()), "host_bytes": memory.host,
             "low_bytes": memory.low, "high_bytes": memory.high}
    return {"rank": rank, "pp_rank": memory.pp_rank, **{name: round(size) for name, size in parts.items()}}
