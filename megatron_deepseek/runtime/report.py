"""The report of a run while it runs: metrics.jsonl, progress on the terminal, TensorBoard.

A `Report` passes each event on to its listeners. Rank 0 has `open_report(...)`; every other rank has `Report()`, which
has no listeners and says nothing, so the loop never asks which rank it is on.
"""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from tqdm import tqdm

from megatron_deepseek.launch.ending import silence
from megatron_deepseek.runtime.expert_listener import ExpertLoadKeeper
from megatron_deepseek.runtime.expert_load import ExpertLoad
from megatron_deepseek.runtime.megatron_curves import Curves
from megatron_deepseek.runtime.metrics import FILE_NAME, MetricsFile, StepMetrics
from megatron_deepseek.runtime.open_metrics import OpenMetricsFile
from megatron_deepseek.runtime.tensorboard import TensorBoard
from megatron_deepseek.runtime.weights_and_biases import WeightsAndBiases
from megatron_deepseek.settings import RunSettings


class Listener(Protocol):
    """A receiver of the events of a run; iterations count finished updates."""

    def step(self, metrics: StepMetrics) -> None: ...

    def validation(self, iteration: int, lm_loss: float, mtp_loss: tuple[float, ...],
                   source_loss: dict[str, float] | None, mtp_acceptance: tuple[float, ...]) -> None: ...

    def held_out(self, iteration: int, name: str, results: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class CurveListener(Protocol):
    """A listener that also draws the curves that Megatron-LM has names for."""

    def curves(self, iteration: int, curves: Curves) -> None: ...


@runtime_checkable
class ExpertLoadListener(Protocol):
    """A listener to which experts' load is told as well."""

    def expert_load(self, load: ExpertLoad) -> None: ...


class Report:
    """Passes events on to every listener, in order. As a context manager it closes them when the run fails."""

    def __init__(self, *listeners: Listener):
        self._listeners = listeners

    def step(self, metrics: StepMetrics) -> None:
        for listener in self._listeners:
            listener.step(metrics)

    def validation(self, iteration: int, lm_loss: float, mtp_loss: tuple[float, ...] = (),
                   source_loss: dict[str, float] | None = None, mtp_acceptance: tuple[float, ...] = ()) -> None:
        """Report a validation. `mtp_acceptance`: the part of each MTP depth's drafts that agree with the main model.

        Call it before the checkpoint of the same iteration is written: a run resumed there does not validate again.
        """
        for listener in self._listeners:
            listener.validation(iteration, lm_loss, tuple(mtp_loss), source_loss, tuple(mtp_acceptance))

    def held_out(self, iteration: int, name: str, results: dict[str, Any]) -> None:
        """Report the evaluation of a set that fine-tuning holds out; like `validation` before the checkpoint."""
        for listener in self._listeners:
            listener.held_out(iteration, name, results)

    def curves(self, iteration: int, curves: Curves | None) -> None:
        """Pass on what has names of Megatron-LM's, to the listeners that draw curves."""
        for listener in self._listeners if curves is not None else ():
            if isinstance(listener, CurveListener):
                listener.curves(iteration, curves)

    def expert_load(self, load: ExpertLoad) -> None:
        """Report how evenly experts were used since the last such report."""
        for listener in self._listeners:
            if isinstance(listener, ExpertLoadListener):
                listener.expert_load(load)

    def message(self, text: str) -> None:
        for listener in self._listeners:
            listener.message(text)

    def close(self) -> None:
        """Close all listeners, once. Raise the first OSError of one that could not keep what it was given."""
        listeners, self._listeners, errors = self._listeners, (), []
        for listener in listeners:
            try:
                listener.close()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:
                raise


def _has_room_for_a_bar(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal with a width: in one of 0 columns, as of some launchers, no bar is seen."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True  # a terminal that does not tell its width


def open_report(run: RunSettings, resumed_iteration: int = 0, stream: TextIO | None = None) -> Report:
    """Return the report of rank 0. `stream`, standard output by default, gets a bar if it is a terminal."""
    stream = stream or sys.stdout
    progress = (ProgressBar if _has_room_for_a_bar(stream) else ProgressLines)(run, resumed_iteration, stream)
    listeners: list[Listener] = []
    if run.tensorboard_dir is not None:
        listeners.append(TensorBoard(run.tensorboard_dir, resumed_iteration, progress.message,
                                     run.tensorboard_queue_size))
    if run.wandb_project is not None:
        listeners.append(WeightsAndBiases(run))
    galleries = tuple(listeners)
    if galleries or run.save is not None:  # before the galleries, so that it can draw when it is closed
        listeners.insert(0, ExpertLoadKeeper(run.save, resumed_iteration, galleries, progress.message))
    if run.metrics_file is not None:
        listeners.append(OpenMetricsFile(run.metrics_file, run.wandb_exp_name or _name_of(run), progress.message))
    log = None
    if run.save is not None:
        log = MetricsLog(Path(run.save) / FILE_NAME, resumed_iteration, progress.message)
        listeners.append(log)
    report = Report(*listeners, progress)
    if log is not None and log.removed:
        report.message(f"{log.path}: removed {log.removed} records after iteration {resumed_iteration}, "
                       "where this run starts")
    return report


def _name_of(run: RunSettings) -> str:
    """Return what tells a run from others on its machine: the last folder of --save."""
    return run.save.resolve().name if run.save is not None else ""


class MetricsLog:
    """A listener that keeps metrics.jsonl."""

    def __init__(self, path: Path, resumed_iteration: int, tell: Callable[[str], None]):
        self.path = path
        self._file = MetricsFile(path, resumed_iteration, tell)
        self.removed = self._file.removed

    def step(self, metrics: StepMetrics) -> None:
        self._file.append(metrics.record())

    def validation(self, iteration: int, lm_loss: float, mtp_loss: tuple[float, ...],
                   source_loss: dict[str, float] | None, mtp_acceptance: tuple[float, ...]) -> None:
        more = {} if source_loss is None else {"validation_source_loss": source_loss}
        more |= {"validation_mtp_acceptance": mtp_acceptance} if mtp_acceptance else {}
        self._file.append({"iteration": iteration, "validation_lm_loss": lm_loss, "validation_mtp_loss": mtp_loss,
                           **more})

    def held_out(self, iteration: int, name: str, results: dict[str, Any]) -> None:
        self._file.append({"iteration": iteration, "eval_set": name,
                           **{f"eval_{key}": value for key, value in results.items()}})

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class Progress(ABC):
    """A listener for a person, to whom evaluations are messages."""

    @abstractmethod
    def message(self, text: str) -> None:
        """Print a line."""

    def validation(self, iteration: int, lm_loss: float, mtp_loss: tuple[float, ...],
                   source_loss: dict[str, float] | None, mtp_acceptance: tuple[float, ...]) -> None:
        self.message(_validation_line(iteration, lm_loss, mtp_loss, source_loss, mtp_acceptance))

    def held_out(self, iteration: int, name: str, results: dict[str, Any]) -> None:
        self.message(_held_out_line(iteration, name, results))


class ProgressBar(Progress):
    """A bar with loss, tokens a second and the time left, for a terminal."""

    def __init__(self, run: RunSettings, resumed_iteration: int, stream: TextIO):
        self._bar = tqdm(total=run.train_iters, initial=resumed_iteration, file=stream, unit="step", dynamic_ncols=True)
        self._stream = stream

    def step(self, metrics: StepMetrics) -> None:
        self._bar.set_postfix_str(f"{metrics.shown_loss}, {metrics.tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def message(self, text: str) -> None:
        self._bar.write(text, file=self._stream)

    def close(self) -> None:
        self._bar.close()


class ProgressLines(Progress):
    """A line for the first step, every log_interval and the last, for a file or a pipe; each flushed."""

    def __init__(self, run: RunSettings, resumed_iteration: int, stream: TextIO):
        self._run, self._stream = run, stream
        self._begun, self._begun_at = resumed_iteration, time.monotonic()

    def step(self, metrics: StepMetrics) -> None:
        done, total = metrics.iteration, self._run.train_iters
        if done % self._run.log_interval and done not in (self._begun + 1, total):
            return
        fields = [f"iteration {done:>{len(str(total))}}/{total}", metrics.shown_loss]
        fields += [form(metrics.objective[key]) for key, form in _REWARDS.items() if key in metrics.objective]
        fields += [f"mtp loss {_losses(metrics.mtp_loss)}"] if metrics.mtp_loss else []
        fields += [f"grad norm {metrics.grad_norm:.3f}", f"learning rate {metrics.learning_rate:.3e}",
                   f"{metrics.tokens_per_second:,.0f} tokens/s"]
        fields += [f"mfu {metrics.mfu:.1%}"] if metrics.mfu is not None else []
        if metrics.tflops_per_rank is not None:
            fields.append(f"{metrics.tflops_per_rank:,.1f} TFLOP/s a rank")
        self.message(" | ".join([*fields, f"{self._time_left(done)} left"]))

    def _time_left(self, done: int) -> timedelta:
        """Estimate the time left from the pace of this process so far, validation and saving included."""
        pace = (time.monotonic() - self._begun_at) / (done - self._begun)
        return timedelta(seconds=round(pace * (self._run.train_iters - done)))

    def message(self, text: str) -> None:
        """Print a line. A reader that has gone (a closed terminal, `| head`) ends the printing, not the training."""
        for stream, said in ((self._stream, text), (sys.stderr, "nobody reads the output any more; training goes on")):
            try:
                print(said, file=stream, flush=True)
                return
            except BrokenPipeError:
                silence(stream)

    def close(self) -> None:
        self._stream.flush()


def _validation_line(iteration: int, lm_loss: float, mtp_loss: tuple[float, ...],
                     source_loss: dict[str, float] | None, mtp_acceptance: tuple[float, ...]) -> str:
    fields = [f"validation at iteration {iteration}", f"lm loss {lm_loss:.4f}"]
    fields += [f"mtp loss {_losses(mtp_loss)}"] if mtp_loss else []
    fields += [f"mtp acceptance {_shares(mtp_acceptance)}"] if mtp_acceptance else []
    shown = list((source_loss or {}).items())
    if shown:
        more = f", and {len(shown) - _SHOWN_SOURCES} more" if len(shown) > _SHOWN_SOURCES else ""
        fields.append(", ".join(f"{name} {loss:.4f}" for name, loss in shown[:_SHOWN_SOURCES]) + more)
    return " | ".join(fields)


def _held_out_line(iteration: int, name: str, results: dict[str, Any]) -> str:
    """Return the results that are there, in the order of `_HELD_OUT`; then other numbers, without their errors."""
    shown = [form(results[key]) for key, form in _HELD_OUT.items() if results.get(key) not in (None, ())]
    shown += [f"{key.replace('_', ' ')} {value:.4f}" for key, value in results.items()
              if key not in _HELD_OUT and isinstance(value, float) and "_stderr" not in key]
    return " | ".join([f"{name} at iteration {iteration}", *shown])


_REWARDS: Mapping[str, Callable[[Any], str]] = {
    "rewards_margin": "reward margin {:.4f}".format, "rewards_accuracy": "reward accuracy {:.1%}".format,
    "kl": "kl {:.4f}".format, "reward": "reward {:.4f}".format}
_HELD_OUT: Mapping[str, Callable[[Any], str]] = {
    "loss": "loss {:.4f}".format, "perplexity": "perplexity {:.3f}".format,
    "token_accuracy": "token accuracy {:.1%}".format, "exact_match": "exact match {:.1%}".format,
    "answers": "of {} answers".format, "mtp_loss": lambda losses: f"mtp loss {_losses(losses)}",
    "mtp_acceptance": lambda shares: f"mtp acceptance {_shares(shares)}", **_REWARDS}
_SHOWN_SOURCES = 16  # of a blend's datasets; metrics.jsonl has all


def _shares(shares: tuple[float, ...]) -> str:
    return " ".join(f"{share:.1%}" for share in shares)


def _losses(losses: tuple[float, ...]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)
