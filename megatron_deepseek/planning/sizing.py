"""How many GPUs a model needs for a task: layouts that are tried, and the one that needs least memory.

It looks for what fits, not for what is fast: whole layers are recomputed, pipelines are 1F1B, experts are spread as far
as they go. `plan.py search` chooses by time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import RankMemory, all_ranks, verdict, worst
from megatron_deepseek.planning.tasks import Task
from megatron_deepseek.settings import Settings

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PIPELINES = (1, 2, 4, 8, 16)
_MOST_EXPERT_RANKS = 64


@dataclass(frozen=True)
class Sized:
    """The layout of so many GPUs that needs least, its fullest rank, and whether it fits."""

    layout: Layout
    memory: RankMemory
    verdict: str

    @property
    def words(self) -> str:
        """Return the sizes that are not 1, in short."""
        sizes = [f"{name}{getattr(self.layout, name)}" for name in ("pp", "ep") if getattr(self.layout, name) > 1]
        return " ".join(sizes) or "dp"


def layouts(model: ModelConfig, gpus: int) -> Iterator[Layout]:
    """Yield layouts of `gpus` ranks: every pipeline, and with each the most expert ranks that divide the experts."""
    for pp in PIPELINES:
        if gpus % pp or pp > model.num_hidden_layers:
            continue
        ep = gpus // pp if model.n_routed_experts else 1
        while ep > _MOST_EXPERT_RANKS or (ep > 1 and model.n_routed_experts % ep):
            ep //= 2
        yield Layout(dp=gpus // pp, pp=pp, ep=ep)


def sized(settings: Settings, gpus: int, gpu: Gpu, task: Task) -> Sized:
    """Return the layout of `gpus` ranks for which the fullest rank needs least."""
    found = []
    for layout in layouts(settings.model, gpus):
        micro_batches = max(8, 2 * layout.pp)
        batch = replace(settings.batch, global_batch_size=micro_batches * layout.dp)
        job = Job(replace(settings, layout=layout, batch=batch), frozen_base=task.name in ("lora", "qlora"))
        ranks = all_ranks(job, 1.0, task)
        found.append(Sized(layout, worst(ranks), verdict(ranks, gpu)))
    return min(found, key=lambda each: each.memory.high)


def fewest(settings: Settings, gpu: Gpu, task: Task) -> tuple[int, Sized] | None:
    """Return the least of COUNTS that fits without doubt, None for none of them."""
    for gpus in COUNTS:
        found = sized(settings, gpus, gpu, task)
        if found.verdict == "fits":
            return gpus, found
    return None
