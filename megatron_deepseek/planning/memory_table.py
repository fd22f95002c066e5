"""What a start says of its memory before it reads any weights: a short table of the fullest device.

    base weights, nf4, scales quantised     7.60 GiB
    adapters                                0.53 GiB
    ...

Base, adapters, gradients and moments are the bytes that are allocated, where data ranks divide every tensor evenly;
routers' biases are not counted. Gathered weights and activations are calculated (docs/planning.md): activations as if
every weight were trained, so adapters keep less.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.planning.binary_units import unit_for
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import RankMemory, all_ranks
from megatron_deepseek.planning.state_bytes import base_bytes, data_ranks
from megatron_deepseek.settings import Settings


@dataclass(frozen=True)
class Part:
    """A line of the table; `on_host`: the bytes are in the host's memory, and not in the sum."""

    name: str
    bytes: float
    on_host: bool = False


def memory_table(settings: Settings, cuda: bool) -> Iterator[str]:
    """Yield the lines for the rank with the most on its device, in one unit. `cuda`: its kernels, or those of CPU."""
    job = Job(settings, cuda=cuda, frozen_base=settings.lora is not None)
    fullest = max(all_ranks(job), key=lambda memory: memory.peak_bytes)
    parts = [part for part in memory_parts(job, fullest.pp_rank, fullest) if part.bytes]
    of_rank = f", of pipeline rank {fullest.pp_rank}," if settings.layout.pp > 1 else ""
    yield f"memory of a rank{of_rank} before weights are read, calculated (docs/planning.md):"
    together = Part("together", sum(part.bytes for part in parts if not part.on_host))
    rows = (*parts, together)
    width, unit = max(len(row.name) for row in rows), unit_for(max(row.bytes for row in rows))
    for row in rows:
        yield f"  {row.name:{width}}  {row.bytes / unit.bytes:8.2f} {unit.name}{' of the host' if row.on_host else ''}"


def memory_parts(job: Job, pp_rank: int, memory: RankMemory | None = None) -> Iterator[Part]:
    """Yield the parts of what a rank of pipeline rank `pp_rank` holds, those of all ranks in the same order."""
    memory = memory or all_ranks(job)[pp_rank]
    states, settings = memory.states, job.settings
    host, weights = states.on_host, states.weights.all
    if settings.lora is None:
        yield Part("weights", weights, host)
    else:
        dense, experts = data_ranks(job)
        base = base_bytes(job, [job.stages[stage] for stage in job.held(pp_rank)]).padded
        of_base = base.dense / dense + base.experts / experts
        form = settings.base.form if settings.base else "bf16" if settings.run.bf16 else "fp32"
        yield Part(f"base weights, {form}", of_base, host)
        yield Part("adapters", weights - of_base, host)
    yield Part("gathered weights", states.gathered.all)
    yield Part("gradients", states.reduced.all, host)
    yield Part("sums of gradients", states.gradients.all)
    yield Part("moments", states.optimizer.all, host)
    yield from (Part(name, number) for name, number in memory.extra.items())
    yield Part("activations", memory.activations + memory.receive)
