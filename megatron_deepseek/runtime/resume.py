"""The time before the first step: files are checked, and a checkpoint is loaded or the run starts anew."""

import os
from dataclasses import replace
from pathlib import Path

from megatron_deepseek.checkpoint.convert.tokenizer_files import check_template
from megatron_deepseek.checkpoint.integrity import CHECKSUMS, read_checksums
from megatron_deepseek.checkpoint.adapter.base import Base, form_of, holds_adapters
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.checkpoint.job.adapters import check_adapter, load_adapter, load_with_base
from megatron_deepseek.checkpoint.job.export import check_export
from megatron_deepseek.checkpoint.loadable import refuse_damage
from megatron_deepseek.checkpoint.publishing import check_writable
from megatron_deepseek.checkpoint.tracker import is_huggingface, leftover_notes
from megatron_deepseek.checkpoint.train_state import TrainState, read_state
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.device import has_accelerator
from megatron_deepseek.model.architecture.adapters import adapter_rows, describe_adapters
from megatron_deepseek.model.architecture.freezing import describe_frozen, is_frozen, parameter_shapes
from megatron_deepseek.model.base_weights import check_torch
from megatron_deepseek.ops.backends.startup import describe_kernels
from megatron_deepseek.parallel.restarts import job_name
from megatron_deepseek.parallel.start import choose_device
from megatron_deepseek.planning.memory_table import memory_table
from megatron_deepseek.planning.node_reach import describe_reach
from megatron_deepseek.runtime.adapter_export import check_new_adapter
from megatron_deepseek.runtime.decision import Start, decide
from megatron_deepseek.runtime.recorded import Job, RecordedArguments, differences, explain_marks
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.save_lock import SaveLock
from megatron_deepseek.runtime.task import Task
from megatron_deepseek.runtime.user_errors import end_on_user_error, end_taken_over
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.schedules import schedule_of
from megatron_deepseek.training.timeline import last_iteration, timeline, with_past
from megatron_deepseek.training.trainer import Trainer


def this_job() -> Job:
    """Return this job; its name is empty on other ranks than 0, which do not ask the agent's store for it."""
    return Job.here(job_name() if _is_first_rank() else "")


def save_lock(settings: Settings, job: Job) -> SaveLock | None:
    """Return rank 0's lock of --save, not yet acquired; None on other ranks, and without --save."""
    if settings.run.save is None or not _is_first_rank():
        return None
    return SaveLock(settings.run.save, job.name, lambda line: print(line, flush=True),
                    lambda holder: end_taken_over(settings.run.save, holder))


def check_and_decide(settings: Settings, job: Job, lock: SaveLock | None, task: Task) -> Start | None:
    """Check the files of the run and decide what it begins from, on rank 0 before anything is built.

    A user's mistake ends the job with one line. Return None on other ranks.
    """
    if not _is_first_rank():
        return None
    with end_on_user_error(lock=lock):
        choose_device()
        if settings.base is not None:
            check_torch()
        settings = task.check(settings)
        run = settings.run
        if run.chat_template is not None:
            tokenizer = build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model)
            check_template(run.chat_template, tokenizer, f"--tokenizer-model {settings.data.tokenizer_model}")
        for option, directory in (("--save", run.save), ("--tensorboard-dir", run.tensorboard_dir),
                                  ("--metrics-file", run.metrics_file and run.metrics_file.parent)):
            if directory is not None:
                check_writable(option, directory)
        if lock is not None:
            lock.acquire()
        start = decide(run, settings.model, job, lock.me.token if lock is not None else "", settings.lora,
                       form_of(settings.base))
        if run.save_adapter is not None:
            check_new_adapter(run.save_adapter)
        if run.load_adapter is not None and start.load is not None:
            _check_adapter(settings, start)
        schedule_of(settings.learning_rate, run, settings.batch, _begins_at(start))
        if settings.lora or settings.fine_tuning or settings.reinforcement:  # before weights are read that may not fit
            print(*memory_table(settings, has_accelerator()), sep="\n", flush=True)
        if run.save_hf is not None:
            check_export(run, settings.model, start.load if _is_finished(settings, start) else None)
        return start


def _check_adapter(settings: Settings, start: Start) -> None:
    """Raise ValueError for a --load-adapter that cannot be used; a run that goes on has adapters of its own."""
    run = settings.run
    if not holds_adapters(start.load):
        check_adapter(run.load_adapter, settings.model, settings.lora)
    elif start.finetune:
        raise ValueError(f"--load {start.load} holds adapters, and so does --load-adapter {run.load_adapter}: give one")


def _is_finished(settings: Settings, start: Start) -> bool:
    """Return whether --save holds the last checkpoint that this run would make."""
    state = _begins_at(start)
    return start.is_saved and last_iteration(settings.run, settings.batch, state) <= state.iteration


def _begins_at(start: Start) -> TrainState:
    """Return the state of the run once `start` is loaded."""
    if start.load is None or start.finetune or is_huggingface(start.load):
        return TrainState()
    return read_state(start.load)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def num_samples(settings: Settings, state: TrainState = TrainState()) -> tuple[int, int, int]:
    """Return how many samples of the train, valid and test split a run at `state` has read at its end."""
    train = timeline(settings.batch, state).samples(max(settings.run.train_iters, state.iteration))
    valid = settings.run.eval_iters * settings.batch.global_batch_size
    return train, valid or int(settings.data.full_validation), 0  # how many these are, only the data tells


def resume(start: Start, trainer: Trainer, adapter: Path | None = None) -> tuple[TrainState, Base | None]:
    """Load what was decided on, and return the state of the run, and the base of its adapters if it trains some.

    Every byte is checked first, by each rank in its share of the files. Adapters begin from those of PEFT in the
    directory `adapter`, unless a checkpoint has them.
    """
    if start.load is None:
        return TrainState(), None
    base, optimizer = None, None if start.weights_only else trainer.optimizer
    lora = trainer.spec.build.lora
    with end_on_user_error():
        refuse_damage(start.load, verify(start.load) or [])
        if lora is None:
            state = checkpoint.load(start.load, trainer.stages, optimizer, start.new_modules,
                                    start.dropped_modules)
        else:
            state, base = load_with_base(start.load, trainer.stages, optimizer, trainer.meshes.device,
                                         start.dropped_modules)
            if adapter is not None and not holds_adapters(start.load):
                load_adapter(adapter, trainer.stages, trainer.spec.model, lora)
    if start.finetune:
        return TrainState(), base
    return state.without_optimizer() if start.weights_only else state, base


def go_on(settings: Settings, state: TrainState) -> tuple[Settings, TrainState]:
    """Return the settings of a run that goes on from `state`, with its last iteration, and `state` with its past."""
    state = with_past(state, settings.batch)
    run = replace(settings.run, train_iters=last_iteration(settings.run, settings.batch, state))
    return replace(settings, run=run), state


def describe(report: Report, settings: Settings, trainer: Trainer, start: Start, state: TrainState,
             notes: tuple[str, ...] = ()) -> None:
    """Report what this job is, its task's `notes`, what it continues, and what a killed one left behind."""
    layout, run = settings.layout, settings.run
    sizes = " ".join(f"{name}={getattr(layout, name)}" for name in ("dp", "pp", "tp", "cp", "ep", "etp"))
    schedule = f", {settings.pipeline.schedule}" if layout.pp > 1 else ""
    report.message(f"{settings.model.describe_parameters()}, on {layout.world_size} ranks ({sizes}{schedule}), "
                   f"{trainer.meshes.device.type}, {'bf16' if run.bf16 else 'fp32'}"
                   + (f", fp8 {run.fp8_format} blockwise" if run.fp8_format else ""))
    reach = describe_reach(settings.model, layout, settings.communication.moe_ranks_per_node or layout.world_size)
    frozen = [describe_frozen(settings.model, run.freeze_parameters)] if run.freeze_parameters else []
    lora = [describe_adapters(settings.model, settings.lora)] if settings.lora is not None else []
    for line in (*describe_kernels(run.fp8_format is not None), *frozen, *lora, *settings.notes, *notes, *reach):
        report.message(line)
    for root in dict.fromkeys(root for root in (run.load, run.save) if root is not None):
        for note in leftover_notes(root):
            report.message(note)
    for note in start.notes:
        report.message(note)
    if start.load is not None:
        _describe_loaded(report, settings, trainer, start, state)


def _describe_loaded(report: Report, settings: Settings, trainer: Trainer, start: Start, state: TrainState) -> None:
    """Report where the run is, or that it is at its end."""
    directory, last = start.load, settings.run.train_iters
    if state.iteration == last:
        report.message(f"loaded {directory}: this run is finished, iteration {last} of {last}; nothing is left to do")
    elif state.iteration > last:
        report.message(f"loaded {directory}: its iteration {state.iteration} is past the {last} of this run; nothing "
                       "is left to do, and a larger --train-iters or --train-samples goes on")
    elif state.iteration == 0:
        report.message(f"loaded the weights of {directory}, beginning at iteration 0")
    else:
        report.message(f"loaded {directory}, continuing at iteration {state.iteration}")
    if settings.run.init_mtp:
        new = len(start.new_modules)
        report.message(f"--init-mtp: {new or 'no'} new Multi-Token Prediction module{'s' * (new > 1)}"
                       + (", the optimizer begins afresh" if new else f", {directory} holds what the model has"))
    if not is_huggingface(directory) and read_checksums(directory) is None:
        report.message(f"{directory} has no {CHECKSUMS}, so its files were not checked: it was saved by an older "
                       "version, or converted")
    for line in _describe_moments(directory, settings, trainer, state.optimizer_steps) if state.optimizer_steps else ():
        report.message(line)


def _describe_moments(directory: Path, settings: Settings, trainer: Trainer, steps: int) -> list[str]:
    """Return lines on what a resumed run changes: dtypes of moments, parameters newly trained or newly frozen."""
    if settings.lora is None:
        trained = {name for name in parameter_shapes(settings.model)
                   if not is_frozen(name, settings.run.freeze_parameters)}
    else:
        trained = {row.name for row in adapter_rows(settings.model, settings.lora)}
    return [*checkpoint.converted_moments(directory, trainer.optimizer),
            *describe_resumed(trained, checkpoint.with_moments(directory), steps)]


def describe_resumed(trained: set[str], saved: set[str], steps: int) -> list[str]:
    """Return a line for parameters that are `trained` from here on and were not when the moments of those `saved` were,
    and one for the other way round. `steps`: the updates that the checkpoint has behind it.
    """
    lines = []
    if new := sorted(trained - saved):
        lines.append(f"{_some(new)} trained from here on and had no moments in the checkpoint: these begin at zero and "
                     f"step 0, while those of others have {steps} steps behind them")
    if left := sorted(saved - trained):
        lines.append(f"{_some(left)} frozen from here on: the weights stay as they were loaded, the moments go")
    return lines


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} parameters, first {names[0]}, are"


def describe_changes(report: Report, start: Start, here: RecordedArguments) -> None:
    """Report which settings of a resumed run have changed since the checkpoint was saved."""
    lines = differences(start.before, here) if start.before is not None else []
    if lines:
        report.message(f"since {start.load} was saved, the run was changed:")
    for line in [*lines, *explain_marks(lines)]:
        report.message(line)
