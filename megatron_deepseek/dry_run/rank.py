"""One rank of a job, without the job: its real trainer makes one real step on tensors without numbers."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.dry_run.fake_tensors import nothing_computed
from megatron_deepseek.dry_run.labels import LabellingWatch, label_passing, label_states
from megatron_deepseek.dry_run.loads import Wrap, drawn, with_dispatchers
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import Timeline, bytes_over_time
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, place_stages, sharded_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.positions import TOKEN_KEYS
from megatron_deepseek.parallel.fake_job import fake_job
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.recorded_collectives import Collective, RecordedCollectives
from megatron_deepseek.parallel.schedule_rules import INTERLEAVED, microbatch_rule, takes_microbatches
from megatron_deepseek.planning.held_parameters import held_adapters, held_parameters
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import RankMemory, rank_memory
from megatron_deepseek.runtime.job import training_spec
from megatron_deepseek.settings import Settings
from megatron_deepseek.torch_private import unset_fake_temporarily
from megatron_deepseek.training.objective import Objective
from megatron_deepseek.training.trainer import Trainer


def empty_stages(wrap: Wrap, config: ModelConfig, mine: Iterable[Stage], meshes: Meshes, seq_length: int,
                 options: BuildOptions) -> list[DeepseekStage]:
    """Return stages without initial weights whose dispatchers are those of `wrap`. Meshes are made as ever."""
    with unset_fake_temporarily():
        stages = sharded_stages(config, mine, meshes, seq_length, options)
    place_stages(stages, meshes, options)
    return with_dispatchers(stages, wrap, meshes)


def batch_of(settings: Settings) -> Batch:
    """Return one data rank's rows of a global batch, with nothing in particular in them. Where attention stays within
    documents every other row is one document, of which attention needs most, and those between are two. Tokens have
    keys where adapters drop features, as in a run (training/token_keys.py).
    """
    rows, length = settings.batch.global_batch_size // settings.layout.dp, settings.data.seq_length
    documents = None
    if settings.data.reset_attention_mask and settings.fine_tuning is None:
        with unset_fake_temporarily():  # they stay on the host, which reads where they end
            documents = (torch.arange(rows) % 2).unsqueeze(1) * (torch.arange(length) * 2 // length)
    drops = settings.lora is not None and settings.lora.lora_dropout > 0
    return Batch(tokens_BS=torch.zeros((rows, length), dtype=torch.int64),
                 labels_BS=torch.zeros((rows, length), dtype=torch.int64), weights_BS=torch.ones((rows, length)),
                 documents_BS=documents,
                 per_token={TOKEN_KEYS: torch.zeros((rows, length), dtype=torch.int64)} if drops else {})


_ALL_AT_ONCE = ("GPipe", "LoopedBFS")  # every micro-batch's forward comes before the first backward


@dataclass(frozen=True)
class RankStep:
    """What a dry run of a rank has found: bytes over time, the collectives in the order in which they begin, and the
    memory that was planned for it. `micro_batches` were made, of a data rank's `all_micro_batches`.
    """

    rank: int
    micro_batches: int
    all_micro_batches: int
    timeline: Timeline
    collectives: tuple[Collective, ...]
    planned: RankMemory


def dry_rank(wanted: DryRun, settings: Settings, rank: int, progress: Callable[[int], None] | None = None) -> RankStep:
    """Return what a step of rank number `rank` takes. `progress` is told how many acts there are whenever one ends."""
    whole = replace(Job(settings), cuda=wanted.device == "gpu", frozen_base=settings.lora is not None)
    pp_rank = rank * settings.layout.pp // settings.layout.world_size
    settings = with_micro_batches(settings, wanted.micro_batches or enough_micro_batches(whole, wanted))
    job = replace(whole, settings=settings)
    acts = sum(map(len, job.actions(pp_rank)))
    log = StorageLog(on_end=partial(progress, acts) if progress else None)
    calls = RecordedCollectives(place=log.now)
    run_rank(settings, rank, drawn(settings, wanted.routing), log, calls if wanted.communication else nullcontext(),
             objective_of(settings), wanted.device == "gpu")
    return RankStep(rank, job.micro_batches, whole.micro_batches, bytes_over_time(log), tuple(calls.calls),
                    rank_memory(whole, pp_rank))


def enough_micro_batches(job: Job, wanted: DryRun) -> int:
    """Return how many micro-batches show all that is wanted: of collectives all, of memory so many that every rank has
    been at its fullest, and has added gradients to sums. No rank has forwards of more micro-batches in flight than
    twice the pipeline ranks, but for schedules that make all of them first. With one more each of its stages has sums
    while they are in flight; interleaved schedules keep the length of their rounds.
    """
    if wanted.communication or job.schedule in _ALL_AT_ONCE:
        return job.micro_batches
    pp = job.layout.pp
    number = 2 * pp + 1
    if pp > 1 and job.schedule in INTERLEAVED:
        of_a_round = job.micro_batches // max(1, job.micro_batches // pp)
        number = -(-number // of_a_round) * of_a_round
    return min(job.micro_batches, number)


def with_micro_batches(settings: Settings, number: int) -> Settings:
    """Return the settings with so many micro-batches on each data rank. Raise ValueError where the schedule cannot."""
    layout, schedule = settings.layout, settings.pipeline.schedule
    if layout.pp > 1 and not takes_microbatches(schedule, layout.pp, number):
        raise ValueError(f"--dry-run-micro-batches {number}: {schedule} over {layout.pp} pipeline ranks takes "
                         f"{microbatch_rule(schedule, layout.pp)}")
    size = number * settings.batch.micro_batch_size * layout.dp
    return replace(settings, batch=replace(settings.batch, global_batch_size=size))


def objective_of(settings: Settings) -> Objective | None:
    """Return what the task of `settings` trains for, None for the next token."""
    if settings.fine_tuning is None:
        return None
    from megatron_deepseek.finetuning.objectives import objective_of

    return objective_of(settings.fine_tuning.loss_average, settings.model.num_nextn_predict_layers,
                        settings.loss.mtp_loss_scaling_factor)


def run_rank(settings: Settings, rank: int, wrap: Wrap, log: StorageLog, others: AbstractContextManager,
             objective: Objective | None = None, gpu: bool = False) -> None:
    """Make one step of rank number `rank`, whose dispatchers are those of `wrap`, and have `log` and `others` see it.

    `gpu`: the rank computes on a GPU, else on a CPU.
    """
    with fake_job(settings.layout, rank) as meshes, nothing_computed(gpu), log.watching(), others:
        kept = step(settings, meshes, log, partial(empty_stages, wrap), objective, first_stage_that_trains(settings))
    del kept


def first_stage_that_trains(settings: Settings) -> int:
    """Return the first of all stages with a trained parameter, which ranks of a job tell each other."""
    job = Job(settings)
    for index, stage in enumerate(job.stages):
        held = (held_adapters(job.model, job.layout, [stage], settings.lora) if settings.lora is not None else
                held_parameters(job.model, job.layout, [stage], settings.run.freeze_parameters))
        if held.dense or held.experts:
            return index
    return len(job.stages)


def step(settings: Settings, meshes: Meshes, log: StorageLog, make: Callable[..., list[DeepseekStage]],
         objective: Objective | None = None, first_trained: int | None = None) -> tuple[Trainer, Batch]:
    """Build the trainer of this rank and make one step, all of it seen by `log`. `first_trained`: the first stage that
    trains anything, None where the ranks have told each other.

    Return what has the memory that stays, for the caller to keep until the log is left.
    """
    watch = LabellingWatch(log)
    trainer = watch.trainer = Trainer(training_spec(settings), meshes, objective, make, watch)
    if first_trained is not None:
        trainer.pipeline.travel = replace(trainer.pipeline.travel, first_trained=first_trained)
    batch = batch_of(settings)
    label_states(log, trainer, batch)
    trainer.train_step(batch, learning_rate=1e-3)
    label_passing(log, trainer)
    return trainer, batch
