"""A job on this rank, whatever its task: from settings to a trained checkpoint."""

import platform
import time

import torch
import torch.distributed as dist

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.device import is_accelerator, product_name
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.compiled import BACKEND, check_compiler
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job, limit_waiting
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.runtime.adapter_export import export_adapter
from megatron_deepseek.runtime.decision import Start, overwrite, share
from megatron_deepseek.runtime.export import export
from megatron_deepseek.runtime.failure import guarded
from megatron_deepseek.runtime.loop import Run
from megatron_deepseek.runtime.manifest import FILE as MANIFEST
from megatron_deepseek.runtime.manifest import add_start, describe_start
from megatron_deepseek.runtime.report import Report, open_report
from megatron_deepseek.runtime.resume import check_and_decide, describe, go_on, resume, save_lock, this_job
from megatron_deepseek.runtime.task import Task
from megatron_deepseek.runtime.user_errors import end_on_user_error
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer, TrainingSpec


def run_job(task: Task, settings: Settings) -> None:
    """Run the job of `settings` on this rank. A user's mistake in data or checkpoint ends it with status 2."""
    guarded(_run_job, 60 * settings.run.distributed_timeout_minutes)(task, settings, time.monotonic())


def _run_job(task: Task, settings: Settings, begun: float) -> None:
    job = this_job()
    lock = save_lock(settings, job)
    start = check_and_decide(settings, job, lock, task)
    if start is None:
        task.wait()
    device = choose_device()
    join_job(device, settings.run.distributed_timeout_minutes)
    with end_on_user_error(lock=lock):
        if settings.run.compile:
            check_compiler(device)
        start = share(start, settings.run.save)
        prepared = task.prepare(settings)
    meshes = build_meshes(settings.layout, device)
    trainer = Trainer(training_spec(prepared.settings), meshes, prepared.objective)
    limit_waiting(settings.run.distributed_timeout_minutes)
    if prepared.before_loading is not None:
        with end_on_user_error():
            prepared = prepared.before_loading(trainer, start.origin)
    state, base = resume(start, trainer, settings.run.load_adapter)
    settings, state = go_on(prepared.settings, state)
    with _open_report(settings, start, state) as report:
        if dist.get_rank() == 0:
            with end_on_user_error():
                describe(report, settings, trainer, start, state, prepared.notes)
        run = Run(prepared, settings, trainer, report, start, state, begun, job, base)
        _keep_start(run, device, state)
        run.train()
        export(settings.run, run.state.iteration, report)
        export_adapter(settings.run, run.state.iteration, report)
        with end_on_user_error():
            report.close()
    dist.barrier()
    if lock is not None:
        lock.release()
    dist.destroy_process_group()


def _open_report(settings: Settings, start: Start, state: TrainState) -> Report:
    """Open the report on rank 0; the others' says nothing.

    What --overwrite removes is removed now, after all checks of the user's input.
    """
    if dist.get_rank() != 0:
        return Report()
    with end_on_user_error():
        removed = overwrite(settings.run.save) if start.overwrite else None
        report = open_report(settings.run, state.iteration)
    if removed is not None:
        report.message(removed)
    return report


def _keep_start(run: Run, device: torch.device, state: TrainState) -> None:
    """Add this start to run.json on rank 0, where there is something left to train. A full disk stops no training."""
    save, recorded = run.settings.run.save, run.recorded
    if save is None or recorded is None or state.iteration >= run.settings.run.train_iters:
        return
    name = product_name(device) if is_accelerator(device) else f"CPU ({platform.machine()})"
    try:
        add_start(save, describe_start(run.settings, name, state.iteration, recorded.files))
    except (OSError, ValueError) as error:
        run.report.message(f"this start is not in {save / MANIFEST}: {error}")


def training_spec(settings: Settings) -> TrainingSpec:
    """Return what this job builds. With --bf16 master weights and gradients stay float32."""
    stages = resolve(settings.model, settings.pipeline, settings.layout.pp, settings.data.seq_length)
    return TrainingSpec(
        model=settings.model, stages=stages, schedule=settings.pipeline.schedule,
        seq_length=settings.data.seq_length, micro_batch_size=settings.batch.micro_batch_size,
        optimizer=settings.optimizer,
        build=BuildOptions(
            precision=Precision(torch.float32, torch.bfloat16 if settings.run.bf16 else None,
                                fp8=settings.run.fp8_format is not None, fp8_gather=settings.run.fp8_param_gather),
            compiler=BACKEND if settings.run.compile else None,
            loss=settings.loss, recompute=settings.recompute, communication=settings.communication,
            offload=settings.offload, reshard_after_forward=settings.run.sharding == "optim_grads_params",
            frozen=settings.run.freeze_parameters, lora=settings.lora, base=settings.base,
            seed=settings.run.seed))
