"""What would have to change for a job that does not fit: arguments that were tried, those that help first."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_deepseek.planning.gpus import Gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import OOM, all_ranks, verdict, worst
from megatron_deepseek.planning.tasks import Task
from megatron_deepseek.settings import RecomputeSettings, Settings

_GIB = 2**30


def changed_settings(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Yield (the arguments, the settings with them) of changes that need no other number of GPUs."""
    full = replace(settings, recompute=RecomputeSettings("full"))
    bf16 = replace(settings.optimizer, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
    if settings.recompute.granularity is None:
        modules = ("layernorm", "mla_up_proj", *(("moe_act",) if settings.model.n_routed_experts else ()))
        yield "--recompute-granularity selective", replace(settings, recompute=RecomputeSettings("selective", modules))
    if settings.recompute.granularity != "full":
        yield "--recompute-granularity full", full
    yield from changed_pipeline(full)
    yield "--recompute-granularity full, moments in bf16", replace(full, optimizer=bf16)
    offload = replace(settings.offload, optimizer_cpu_offload=True)
    yield "--recompute-granularity full --optimizer-cpu-offload", replace(full, offload=offload)
    sharded = replace(settings.run, sharding="optim_grads_params")
    yield ("--recompute-granularity full --optimizer-cpu-offload --data-parallel-sharding-strategy optim_grads_params",
           replace(full, offload=offload, run=sharded))


def changed_pipeline(full: Settings) -> Iterator[tuple[str, Settings]]:
    """Yield changes of a pipeline's schedule, for what waits for weight gradients, and of its micro-batches, for their
    receive buffers.
    """
    pp, batch = full.layout.pp, full.batch
    if pp == 1:
        return
    if full.pipeline.schedule != "1F1B" and full.pipeline.layout is None:
        simple = replace(full, pipeline=replace(full.pipeline, schedule="1F1B", num_virtual_stages=1))
        yield "--recompute-granularity full --pipeline-schedule 1F1B", simple
    fewest = 2 * pp * batch.micro_batch_size * full.layout.dp
    if batch.global_batch_size > fewest:
        smaller = replace(full, batch=replace(batch, global_batch_size=fewest, rampup_batch_size=None))
        yield f"--recompute-granularity full --global-batch-size {fewest}", smaller


def changes(job: Job, gpu: Gpu, limit: float, task: Task) -> Iterator[str]:
    """Yield lines: what each change leaves, until one of them fits."""
    for words, settings in changed_settings(job.settings) if task.trains else ():
        ranks = all_ranks(replace(job, settings=settings), 1.0, task)
        found = verdict(ranks, gpu, limit)
        yield f"  {words}: {worst(ranks).low / _GIB:.1f} to {worst(ranks).high / _GIB:.1f} GiB, {found}"
        if found != OOM:
            return
    yield "  none of these is enough: more GPUs, more pipeline or expert ranks, shorter or fewer sequences at once"
