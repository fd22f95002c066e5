"""Before the first step: bad input is refused in a line, and a checkpoint is loaded, or the run starts anew."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_deepseek.arguments import Settings
from megatron_deepseek.checkpoint import distributed as checkpoint
from megatron_deepseek.checkpoint.export import check_export
from megatron_deepseek.checkpoint.integrity import CHECKSUMS, read_checksums
from megatron_deepseek.checkpoint.loadable import refuse_damage
from megatron_deepseek.checkpoint.marker import is_huggingface, leftover_notes
from megatron_deepseek.checkpoint.publish import check_writable
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.pretraining import check_data
from megatron_deepseek.launch.agent import tell_agent
from megatron_deepseek.parallel.lives import agent_store
from megatron_deepseek.parallel.start import choose_device
from megatron_deepseek.planning.node_reach import describe_reach
from megatron_deepseek.training.decision import Start, decide
from megatron_deepseek.training.failure import FailureClaim
from megatron_deepseek.training.recorded import Job, Recorded, differences, explain_marks
from megatron_deepseek.training.report import Report
from megatron_deepseek.training.save_lock import Holder, SaveLock
from megatron_deepseek.training.schedules import global_batch_size
from megatron_deepseek.training.trainer import Trainer

_SILENT_SECONDS = 10.0  # that the other ranks wait to be stopped by torchrun, while one speaks
_FIRST_RANK_SECONDS = 1.0  # that the other ranks leave it, to say what all of them have found


@contextmanager
def refusing(advice: str = "", lock: SaveLock | None = None) -> Iterator[None]:
    """A user's mistake in files ends the job with one line and status 2, whether all ranks find it or one alone."""
    try:
        yield
    except (ValueError, OSError) as error:
        if lock is not None:
            lock.release()
        _refuse(f"{error}{advice}")


def _refuse(line: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(_FIRST_RANK_SECONDS)
    line = f"pretrain_deepseek.py: error: {line}"
    if FailureClaim(agent_store()).is_first():
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(_SILENT_SECONDS)
    tell_agent(line)
    os._exit(2)


def save_lock(settings: Settings, job: Job) -> SaveLock | None:
    """Rank 0's, not yet acquired; None on other ranks, and without --save."""
    if settings.run.save is None or not _is_first_rank():
        return None

    def lost(holder: Holder) -> None:
        _refuse(f"--save {settings.run.save} was taken over by {holder} while this run was suspended or cut off from "
                "it: it stops here, and its last checkpoints may be the other's")

    return SaveLock(settings.run.save, job.name, lambda line: print(line, flush=True), lost)


def refuse_bad_input(settings: Settings, job: Job, lock: SaveLock | None) -> Start | None:
    """Rank 0 looks at files before anything is built, says in one line what is wrong with them, and decides what the
    run begins from. None on other ranks.
    """
    if not _is_first_rank():
        return None
    run = settings.run
    with refusing(lock=lock):
        choose_device()
        check_data(settings.data, settings.model.vocab_size, num_samples(settings))
        for option, directory in (("--save", run.save), ("--tensorboard-dir", run.tensorboard_dir)):
            if directory is not None:
                check_writable(option, directory)
        if lock is not None:
            lock.acquire()
        start = decide(run, settings.model, job, lock.me.token if lock is not None else "")
        if run.save_hf is not None:
            check_export(run.save_hf, settings.model, run.bf16)
        return start


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def num_samples(settings: Settings) -> tuple[int, int, int]:
    """Samples of the train, valid and test split that the run reads."""
    consumed = 0
    for _ in range(settings.run.train_iters):
        consumed += global_batch_size(settings.batch, consumed)
    return consumed, settings.run.eval_iters * settings.batch.global_batch_size, 0


def resume(start: Start, trainer: Trainer) -> TrainState:
    """Load what was decided on. Every byte of it is checked first, each rank its share of the files."""
    if start.load is None:
        return TrainState()
    with refusing():
        refuse_damage(start.load, checkpoint.verify(start.load) or [])
        state = checkpoint.load(start.load, trainer.stages, None if start.weights_only else trainer.optimizer)
    if start.finetune:
        return TrainState()
    return TrainState(state.iteration, state.consumed_samples, 0 if start.weights_only else state.optimizer_steps)


def describe(report: Report, settings: Settings, trainer: Trainer, start: Start, state: TrainState) -> None:
    """What this job is, what it continues, and what a killed one left behind."""
    layout, run = settings.layout, settings.run
    sizes = " ".join(f"{name}={getattr(layout, name)}" for name in ("dp", "pp", "tp", "cp", "ep", "etp"))
    schedule = f", {settings.pipeline.schedule}" if layout.pp > 1 else ""
    report.message(f"{settings.model.num_parameters():,} parameters on {layout.world_size} ranks ({sizes}{schedule}), "
                   f"{trainer.meshes.device.type}, {'bf16' if run.bf16 else 'fp32'}"
                   + (f", fp8 {run.fp8_format} blockwise" if run.fp8_format else ""))
    reach = describe_reach(settings.model, layout, settings.communication.moe_ranks_per_node or layout.world_size)
    for line in (*settings.notes, *reach):
        report.message(line)
    for root in dict.fromkeys(root for root in (run.load, run.save) if root is not None):
        for note in leftover_notes(root):
            report.message(note)
    for note in start.notes:
        report.message(note)
    if start.load is not None:
        _describe_loaded(report, settings, trainer, start, state)


def _describe_loaded(report: Report, settings: Settings, trainer: Trainer, start: Start, state: TrainState) -> None:
    """Where the run is, or that it is at its end."""
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
    if not is_huggingface(directory) and read_checksums(directory) is None:
        report.message(f"{directory} has no {CHECKSUMS}, so its files were not checked: it was saved by an older "
                       "version, or converted")
    for conversion in checkpoint.converted_moments(directory, trainer.optimizer) if state.optimizer_steps else ():
        report.message(conversion)


def describe_changes(report: Report, start: Start, here: Recorded) -> None:
    """Of a run that goes on: what it is told otherwise than when the checkpoint was saved."""
    lines = differences(start.before, here) if start.before is not None else []
    if lines:
        report.message(f"since {start.load} was saved, the run was changed:")
    for line in [*lines, *explain_marks(lines)]:
        report.message(line)
