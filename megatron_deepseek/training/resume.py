"""Before the first step: bad input is refused in a line, and a checkpoint is loaded, or the run starts anew."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.arguments import Settings
from megatron_deepseek.checkpoint import distributed as checkpoint
from megatron_deepseek.checkpoint.export import check_export
from megatron_deepseek.checkpoint.integrity import CHECKSUMS, read_checksums
from megatron_deepseek.checkpoint.loadable import (
    check_checkpoint,
    checkpoint_directory,
    refuse_damage,
    stored_architecture,
)
from megatron_deepseek.checkpoint.marker import is_huggingface, leftover_notes
from megatron_deepseek.checkpoint.mtp import module_prefixes
from megatron_deepseek.checkpoint.publish import check_writable
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.pretraining import check_data
from megatron_deepseek.launch.agent import tell_agent
from megatron_deepseek.parallel.start import choose_device
from megatron_deepseek.planning.node_reach import describe_reach
from megatron_deepseek.training.report import Report
from megatron_deepseek.training.schedules import schedule_of
from megatron_deepseek.training.timeline import last_iteration, timeline, with_past
from megatron_deepseek.training.trainer import Trainer

_SILENT_SECONDS = 10.0  # that the other ranks wait to be stopped by torchrun, while rank 0 speaks


@contextmanager
def refusing(first_rank: bool, advice: str = "") -> Iterator[None]:
    """A user's mistake in files, which every rank inside sees, ends the job with one line and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = f"pretrain_deepseek.py: error: {error}{advice}"
        if first_rank:
            print(line, file=sys.stderr, flush=True)
        else:
            time.sleep(_SILENT_SECONDS)
        tell_agent(line)
        os._exit(2)


def refuse_bad_input(settings: Settings) -> None:
    """Rank 0 looks at files before anything is built, and says in one line what is wrong with them."""
    if os.environ.get("RANK", "0") != "0":
        return
    with refusing(first_rank=True):
        choose_device()
        check_data(settings.data, settings.model.vocab_size, num_samples(settings))
        if settings.run.load is not None:
            check_checkpoint(settings.run.load, settings.model, settings.run.ckpt_step, settings.run.init_mtp)
        if settings.run.save is not None:
            check_writable("--save", settings.run.save)
        if settings.run.save_hf is not None:
            check_export(settings.run.save_hf, settings.model, settings.run.bf16)


def num_samples(settings: Settings, state: TrainState = TrainState()) -> tuple[int, int, int]:
    """Samples of the train, valid and test split that a run at `state` has read in the end."""
    train = timeline(settings.batch, state).samples(max(settings.run.train_iters, state.iteration))
    return train, settings.run.eval_iters * settings.batch.global_batch_size, 0


def resume(settings: Settings, trainer: Trainer) -> TrainState:
    """Load `--load`, or start anew. `--finetune` takes the weights alone and starts counting at zero.

    Every byte of the checkpoint is checked first, each rank its share of the files.
    """
    run = settings.run
    if run.load is None:
        return TrainState()
    with refusing(dist.get_rank() == 0):
        directory = checkpoint_directory(run.load, run.ckpt_step)
        refuse_damage(directory, checkpoint.verify(directory) or [])
        new = new_mtp_modules(settings, directory)
        weights_only = run.finetune or run.no_load_optim or bool(new) or _has_weights_alone(directory)
        state = checkpoint.load(directory, trainer.stages, None if weights_only else trainer.optimizer, new)
    if run.finetune:
        return TrainState()
    return replace(state, optimizer_steps=0 if weights_only else state.optimizer_steps)


def go_on(settings: Settings, state: TrainState) -> tuple[Settings, TrainState]:
    """The settings of a run that goes on from `state`, with the iteration that it ends at; the state with its past.

    A schedule that other batch sizes before `state` make impossible ends the job in a line.
    """
    state = with_past(state, settings.batch)
    run = replace(settings.run, train_iters=last_iteration(settings.run, settings.batch, state))
    with refusing(dist.get_rank() == 0):
        schedule_of(settings.learning_rate, run, settings.batch, state)
    return replace(settings, run=run), state


def new_mtp_modules(settings: Settings, directory: Path) -> list[str]:
    """Beginnings of the names of the MTP modules that --init-mtp begins: those that the checkpoint lacks."""
    if not settings.run.init_mtp:
        return []
    return module_prefixes(settings.model, stored_architecture(directory).num_nextn_predict_layers)


def _has_weights_alone(directory) -> bool:
    """Whether these are released weights, converted or not: nobody trained them here, so nothing of theirs is lost."""
    return is_huggingface(directory) or (directory.name == "iter_0000000" and not checkpoint.has_optimizer(directory))


def describe(report: Report, settings: Settings, trainer: Trainer, state: TrainState) -> None:
    """What this job is, what it continues, and what a killed one left behind."""
    layout, run = settings.layout, settings.run
    sizes = " ".join(f"{name}={getattr(layout, name)}" for name in ("dp", "pp", "tp", "cp", "ep", "etp"))
    schedule = f", {settings.pipeline.schedule}" if layout.pp > 1 else ""
    report.message(f"{settings.model.describe_parameters()}, on {layout.world_size} ranks ({sizes}{schedule}), "
                   f"{trainer.meshes.device.type}, {'bf16' if run.bf16 else 'fp32'}"
                   + (f", fp8 {run.fp8_format} blockwise" if run.fp8_format else ""))
    reach = describe_reach(settings.model, layout, settings.communication.moe_ranks_per_node or layout.world_size)
    for line in (*settings.notes, *reach):
        report.message(line)
    for root in dict.fromkeys(root for root in (run.load, run.save) if root is not None):
        for note in leftover_notes(root):
            report.message(note)
    if run.load is not None:
        directory = checkpoint_directory(run.load, run.ckpt_step)
        report.message(f"loaded {directory}, continuing at iteration {state.iteration}")
        if run.init_mtp:
            new = len(new_mtp_modules(settings, directory))
            report.message(f"--init-mtp: {new or 'no'} new Multi-Token Prediction module{'s' * (new > 1)}"
                           + (", the optimizer begins afresh" if new else f", {directory} holds what the model has"))
        if not is_huggingface(directory) and read_checksums(directory) is None:
            report.message(f"{directory} has no {CHECKSUMS}, so its files were not checked: it was saved by an older "
                           "version, or converted")
        for conversion in checkpoint.converted_moments(directory, trainer.optimizer) if state.optimizer_steps else ():
            report.message(conversion)
