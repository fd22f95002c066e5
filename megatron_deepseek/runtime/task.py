"""What a job trains for. Each entry brings a `Task`; the job and its loop are the same for all.

A task is asked in three stages: it checks what the user gave, on rank 0 before anything is built; it prepares its data,
on all ranks once they have joined the job; and it opens them, once it is known where the run begins.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batch import Batch
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.objective import Objective
from megatron_deepseek.training.trainer import Trainer


class TrainingData(Protocol):
    """The rows of a run, by the number of consumed samples; `source_names` are those of a blend's datasets."""

    source_names: tuple[str, ...]

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
              ) -> Batch: ...


@dataclass(frozen=True, eq=False)
class MadeBatch:
    """This data rank's rows of a global batch that the model made, and what there is to report of them, by name."""

    batch: Batch
    reports: Mapping[str, float] = field(default_factory=dict)


class Maker(Protocol):
    """What makes a run's batches where the model of the moment decides what is in them. All ranks call each method.

    `make` returns the rows of the step after `state`, which counts as `size` samples whatever it holds. `keep` is asked
    when a checkpoint is made of the state behind that step: what it returns writes, on one rank and maybe in a thread,
    the maker's own files into the checkpoint's directory. `resume` is given the directory that a run goes on from, and
    the state there; raise ValueError, on all ranks or none, for files that cannot be used.
    """

    def make(self, trainer: Trainer, state: TrainState, size: int) -> MadeBatch: ...

    def keep(self) -> Callable[[Path], None]: ...

    def resume(self, directory: Path, state: TrainState) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Periodic:
    """Something to be done with the model before the first step, after every `every` iterations, and after the last."""

    every: int
    act: Callable[[Trainer, Report, int], None]


@dataclass(frozen=True)
class RunData:
    """The opened data of a run: what is trained on, how to report what is held out (None if nothing is), and what else
    is to be done from time to time. `complete`: returns a batch with what the model of the moment must compute for it
    before the step, such as another model's log-probabilities; None if nothing is. All ranks call it. `maker`: makes
    the batches where `train` is None.
    """

    train: TrainingData | None
    validate: Callable[[Trainer, Report, int], None] | None = None
    periodic: tuple[Periodic, ...] = ()
    complete: Callable[[Trainer, Batch], Batch] | None = None
    maker: Maker | None = None


@dataclass(frozen=True)
class Prepared:
    """A task whose data is there. `settings` are the run's, with what only the data tells (the length of an epoch).

    `objective`: None for the next token. `open_data` is called by all ranks, and may raise ValueError. `files`: what
    arguments.json records of the files behind the data. `notes`: lines for the start of the run. `before_loading`:
    asked once the trainer is built and before it gets the weights of the run, where the data need other weights first,
    those of a reference model; it may leave any weights in the trainer, and returns the task for the run. It is given
    what the run's first start began from (Start.origin).
    """

    settings: Settings
    open_data: Callable[[Settings, TrainState, Callable[[str], None]], RunData]
    objective: Objective | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    before_loading: Callable[[Trainer, str | None], "Prepared"] | None = None


class Task(ABC):
    """What a job trains for."""

    @abstractmethod
    def check(self, settings: Settings) -> Settings:
        """Return the settings with what only the data tells. Raise ValueError for data that training would trip over.

        Rank 0 calls this before anything is built.
        """

    def wait(self) -> None:
        """Wait until rank 0 has checked, if that takes long: the other ranks call this before they join the job."""

    @abstractmethod
    def prepare(self, settings: Settings) -> Prepared:
        """Return the task with its data made ready. All ranks call this; ValueError is raised on all or none."""
