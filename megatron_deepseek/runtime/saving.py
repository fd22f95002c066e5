"""Checkpoints of a run: in the foreground, or with --async-save in a thread while training goes on.

A save that the file system refuses (no space, no permission, a directory that is gone, an I/O error) leaves the
checkpoints before it as they were. It is reported, and the next save tries again: hours of training are worth more than
their last minutes. It ends the run only when there is no next save. Any other failure ends the run at once.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.checkpoint.adapter.base import BASE, Base
from megatron_deepseek.checkpoint.adapter.export import add_adapter
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.native import ARGUMENTS, LAYOUT, layout_note
from megatron_deepseek.checkpoint.publishing import TrackerNotReplaced, saving_directory
from megatron_deepseek.checkpoint.tracker import (
    find_iteration,
    iteration_directory,
    iterations,
    last_iteration,
    leftover_notes,
)
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.runtime.lock_holder import other_holder
from megatron_deepseek.runtime.recorded import RecordedArguments
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.user_errors import end_taken_over
from megatron_deepseek.settings import RunSettings
from megatron_deepseek.training.trainer import Trainer


def nothing_more() -> Callable[[Path], None]:
    """Return what writes the further files of a checkpoint where a task has none."""
    return lambda directory: None


class TakenOver(Exception):
    """The error after which nothing may be written to --save any more: another run has its lock."""


@dataclass(frozen=True)
class _Pending:
    """A save in the background: what it writes, when it began, and how long training stood still for it."""

    future: Future
    iteration: int
    begun: float
    stall: float


class Saver:
    """The saver of this rank. Every rank has one, and calls `save` after the same steps.

    `begun`: the iteration that was saved last. On rank 0 `recorded` goes into every checkpoint as arguments.json, and
    `keep` writes the files that belong beside the checkpoints, where they are missing. `lock`: the token of --save's
    lock, without which nothing is written there; "" for no lock. `base`: that of adapters, which alone are then saved.
    `more` is asked at each save for what adds the task's own files to the checkpoint's directory, on one rank.
    """

    def __init__(self, run: RunSettings, model: ModelConfig, trainer: Trainer, report: Report, begun: int | None,
                 recorded: RecordedArguments | None = None, keep: Callable[[], None] = lambda: None, lock: str = "",
                 base: Base | None = None, more: Callable[[], Callable[[Path], None]] = nothing_more):
        self.run, self.model, self.report, self.begun, self.keep, self.lock = run, model, report, begun, keep, lock
        self.notes = {LAYOUT: layout_note(trainer.meshes.layout, trainer.spec.stages, trainer.spec.schedule,
                                          trainer.spec.seq_length)}
        if recorded is not None:
            self.notes[ARGUMENTS] = recorded.to_json()
        self.additions: tuple[Callable[[], Callable[[Path], None]], ...] = (more,)
        if base is not None:
            lora = trainer.spec.build.lora
            self.notes[BASE] = base.note(lora)
            self.additions += (lambda: partial(add_adapter, model, lora, base),)
        self.stages, self.optimizer = trainer.stages, None if run.no_save_optim else trainer.optimizer
        self.group = saving_group(run)
        self.background = checkpoint.BackgroundSaver(self.group) if run.async_save else None
        self.pending: _Pending | None = None
        self.failed: OSError | None = None
        self._stall: float | None = None

    def save(self, state: TrainState) -> None:
        """Save `state`, or begin to, unless it is saved already. A save that is still on its way is waited for.

        Only its end tells whether `state` is saved already, and ranks learn of that end at different times.
        """
        begin = time.perf_counter()
        self.finish()
        if self.run.save is None or self.begun == state.iteration:
            return
        self.keep_assets()
        self.failed = None
        if self.background is not None:
            future = self.background.begin(self.run.save, state, self.model, self.stages, self.optimizer,
                                           self.run.keep_last, self.notes, self._still_mine, self._complete())
            stall = time.perf_counter() - begin
            self.pending = _Pending(future, state.iteration, begin, stall)
        else:
            self._save_now(state, begin)
            stall = time.perf_counter() - begin
        self.begun = state.iteration if self.failed is None else None
        self._stall = (self._stall or 0.0) + stall

    def keep_assets(self) -> None:
        """Keep config.json and tokenizer beside the checkpoints, at the start and again with every save.

        The disk may have been full before, or the directory removed. Damaged files (ValueError) end no training either.
        """
        if dist.get_rank() != 0:
            return
        try:
            self.keep()
        except (OSError, ValueError) as error:
            self.report.message(f"config.json and tokenizer are not kept with --save {self.run.save}: {error}. The "
                                "next save tries again")

    def _complete(self) -> Callable[[Path], None]:
        """Return what adds further files to the checkpoint of this moment."""
        writers = [each() for each in self.additions]

        def write(directory: Path) -> None:
            for each in writers:
                each(directory)

        return write

    def _still_mine(self) -> None:
        """End this rank if --save has become another run's while this one was suspended or cut off.

        The watch over the lock would do it a moment later. Every rank asks, since each writes there.
        """
        other = other_holder(self.run.save, self.lock) if self.lock else None
        if other is not None:
            end_taken_over(self.run.save, other)
            raise TakenOver(f"{self.run.save} is of {other}")

    def _save_now(self, state: TrainState, begin: float) -> None:
        try:
            directory = checkpoint.save(self.run.save, state, self.model, self.stages, self.optimizer,
                                        self.run.keep_last, self.group, self.notes, self._still_mine,
                                        self._complete())
        except OSError as error:
            self._survive(error, state.iteration)
        else:
            self.report.message(f"saved {directory} in {time.perf_counter() - begin:.1f} s")
            self._tell_leftovers()

    def poll(self) -> None:
        """Finish a background save that has ended, without waiting. Raise its error."""
        if self.pending is not None and self.pending.future.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background, if there is one. Raise its error."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        error = pending.future.exception()
        if error is not None:
            self._survive(checkpoint.first_failure(error), pending.iteration)
            return
        self.report.message(f"saved {iteration_directory(self.run.save, pending.iteration)} in "
                            f"{time.perf_counter() - pending.begun:.1f} s, for which training stood still "
                            f"{pending.stall:.2f} s")
        self._tell_leftovers()

    def _tell_leftovers(self) -> None:
        """Report old checkpoints that could not be removed: they fill the disk."""
        for note in leftover_notes(self.run.save) if dist.get_rank() == 0 else ():
            self.report.message(note)

    def _survive(self, error: BaseException, iteration: int) -> None:
        """Go on without this checkpoint if the file system refused it; every rank has the same error."""
        if not isinstance(error, OSError):
            raise error
        self.failed, self.begun = error, None
        if dist.get_rank() == 0:
            self._remove_remains(iteration)
        where = f"{error.filename}: " if error.filename else ""
        if isinstance(error, TrackerNotReplaced):
            self.report.message(f"iteration {iteration} is saved, but not named as the last one: {where}"
                                f"{error.strerror}. The next save tries again")
            return
        self.report.message(f"iteration {iteration} is NOT saved: {where}{error.strerror or error}; "
                            f"{what_stays(self.run.save)}. The next save tries again")

    def _remove_remains(self, iteration: int) -> None:
        """Remove what a failed save has written, unless it may be another run's."""
        try:
            self._still_mine()
        except OSError:
            return
        shutil.rmtree(saving_directory(self.run.save, iteration), ignore_errors=True)

    def take_stall(self) -> float | None:
        """Return the seconds that training stood still for saves since the last call, None if there was no save."""
        stall, self._stall = self._stall, None
        return stall

    def close(self) -> None:
        """Wait for the save on its way. Raise OSError if the file system refused the last save of the run."""
        self.finish()
        if self.background is not None:
            self.background.close()
        if self.failed is not None:
            raise self.failed


def what_stays(save: Path) -> str:
    """Say which checkpoint loading takes although one after it could not be made."""
    try:
        named, there = last_iteration(save), iterations(save)
    except OSError:  # a directory that can't even be listed
        named, there = None, []
    if named is None and not there:
        return "there is no checkpoint before it"
    return f"{find_iteration(save, there[-1] if named is None else named)} is as it was"


def saving_group(run: RunSettings) -> dist.ProcessGroup:
    """Return a group of all ranks in which they save, and wait for each other as long as files may take."""
    return dist.new_group(backend="gloo", group_desc="checkpoint",
                          timeout=timedelta(minutes=max(run.distributed_timeout_minutes, _LONGEST_MINUTES)))


_LONGEST_MINUTES = 60.0  # the fastest rank waits so long for the slowest one's file
