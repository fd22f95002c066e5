"""--metrics-file: the run's newest numbers as an OpenMetrics text, for the textfile collector of a node exporter.

The format is that of github.com/prometheus/OpenMetrics 1.0: each metric with its type, its unit, which ends its name,
and a line of help; "# EOF" ends the text. The file is replaced at once, so that no reader sees half of one.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.runtime.expert_load import ExpertLoad
from megatron_deepseek.runtime.metrics import StepMetrics

_PREFIX = "megatron_deepseek_"
_SECONDS_BETWEEN = 1.0  # writes; collectors read every 15 s or so


@dataclass(frozen=True)
class Metric:
    """A metric: its name without prefix and unit, its unit ("" for none), its help, and whether it only rises."""

    name: str
    unit: str
    help: str
    counts: bool = False

    @property
    def full_name(self) -> str:
        return _PREFIX + self.name + (f"_{self.unit}" if self.unit else "")


Sample = tuple[Metric, dict[str, str], float]

_ITERATION = Metric("iteration", "", "Finished optimizer steps, those before a resume included.")
_TIME = Metric("last_step_timestamp", "seconds", "When the last step was finished, since 1970.")
_TOKENS = Metric("tokens", "", "Tokens trained on by this process since its start.", counts=True)
_LOSS = Metric("lm_loss", "nats", "Loss of the main model's next token in the last step.")
_MTP = Metric("mtp_loss", "nats", "Loss of a Multi-Token Prediction depth in the last step.")
_VALIDATION = Metric("validation_lm_loss", "nats", "Loss of the main model in the last validation.")
_GRADIENT = Metric("grad_norm", "", "L2 norm of the gradient before it is clipped.")
_RATE = Metric("learning_rate", "", "Learning rate of the last step.")
_SECONDS = Metric("step", "seconds", "Duration of the last step.")
_SPEED = Metric("tokens_per_second", "", "Tokens of the last step by its duration, of all ranks.")
_MFU = Metric("model_flops_utilization", "ratio", "Part of the accelerators' peak that the model's operations reach.")
_MEMORY = Metric("peak_memory", "bytes", "Largest memory of an accelerator that torch has allocated so far.")
_SKIPPED = Metric("skipped_steps", "", "Steps of this process without an update, for what was not finite.", counts=True)
_EXPERTS = Metric("expert_max_violation", "ratio", "Busiest expert of a layer by the mean, less 1, of the worst layer.")


class OpenMetricsFile:
    """A listener that keeps the file. What cannot be written is told once; training goes on.

    `run` is the label by which several runs of a machine are told apart.
    """

    def __init__(self, path: Path, run: str, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._path, self._run, self._tell, self._clock = path, run, tell, clock
        self._samples: dict[str, list[Sample]] = {}
        self._tokens = self._skipped = 0
        self._written, self._trouble = -math.inf, False
        self._write()

    def step(self, metrics: StepMetrics) -> None:
        self._tokens += metrics.tokens
        self._skipped += bool(metrics.skipped)
        self._samples["step"] = list(_step_samples(metrics))
        self._write_when_due()

    def validation(self, iteration: int, lm_loss: float, mtp_loss: tuple[float, ...],
                   source_loss: dict[str, float] | None, mtp_acceptance: tuple[float, ...]) -> None:
        self._samples["validation"] = [(_VALIDATION, {}, lm_loss)]
        self._write_when_due()

    def held_out(self, iteration: int, name: str, results: dict[str, Any]) -> None:
        if results.get("loss") is not None:
            self._samples[f"held out {name}"] = [(_VALIDATION, {"set": name}, results["loss"])]

    def expert_load(self, load: ExpertLoad) -> None:
        self._samples["experts"] = [(_EXPERTS, {}, load.max_violation)]

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._write()

    def _write_when_due(self) -> None:
        if self._clock() - self._written >= _SECONDS_BETWEEN:
            self._write()

    def _write(self) -> None:
        counted: list[Sample] = [(_TOKENS, {}, self._tokens), (_SKIPPED, {}, self._skipped)]
        samples = [*counted, *(sample for group in self._samples.values() for sample in group)]
        partial = self._path.with_name(self._path.name + ".partial")
        try:
            partial.write_text(render(samples, {"run": self._run}))
            os.replace(partial, self._path)
            self._trouble = False
        except OSError as error:
            if not self._trouble:
                self._tell(f"--metrics-file {self._path} cannot be written: {error.strerror}. Training goes on")
            self._trouble = True
        self._written = self._clock()


def _step_samples(metrics: StepMetrics) -> Iterator[Sample]:
    values = {_ITERATION: metrics.iteration, _TIME: time.time(), _LOSS: metrics.lm_loss, _GRADIENT: metrics.grad_norm,
              _RATE: metrics.learning_rate, _SECONDS: metrics.step_seconds, _SPEED: metrics.tokens_per_second,
              _MFU: metrics.mfu, _MEMORY: metrics.peak_memory_bytes}
    yield from ((metric, {}, value) for metric, value in values.items() if value is not None)
    yield from ((_MTP, {"depth": str(depth)}, loss) for depth, loss in enumerate(metrics.mtp_loss, 1))


def render(samples: Iterable[Sample], labels: dict[str, str]) -> str:
    """Return the text: the samples of a metric together, below its type, unit and help; `labels` on each sample."""
    by_metric: dict[Metric, list[tuple[dict[str, str], float]]] = {}
    for metric, own, value in samples:
        by_metric.setdefault(metric, []).append((own, value))
    lines = []
    for metric, values in by_metric.items():
        name = metric.full_name
        lines += [f"# TYPE {name} {'counter' if metric.counts else 'gauge'}"]
        lines += [f"# UNIT {name} {metric.unit}"] if metric.unit else []
        lines += [f"# HELP {name} {metric.help}"]
        lines += [f"{name}{'_total' * metric.counts}{{{_labels(labels | own)}}} {_number(value)}"
                  for own, value in values]
    return "\n".join([*lines, "# EOF\n"])


def _labels(labels: dict[str, str]) -> str:
    escaped = {name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
               for name, value in labels.items()}
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())


def _number(value: float) -> str:
    """Return a number as the format has it: NaN, +Inf and -Inf by these names."""
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
