"""The curves of a run by the names that Megatron-LM has for them, for TensorBoard and Weights & Biases.

`lm loss`, `grad-norm`, `learning-rate` and the like are there as long as either is written to; --log-*-to-tensorboard
and other options add more. `<name> vs samples` has the consumed samples in place of the iteration, where Megatron-LM
has it.
"""

import math
from dataclasses import dataclass

import torch

from megatron_deepseek.device import memory_statistics
from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.settings import RunSettings

BALANCE = {"seq_aux_loss": "seq_load_balancing_loss", "aux_loss": "load_balancing_loss"}
MEMORY = {"mem-reserved-bytes": "reserved_bytes.all.current", "mem-allocated-bytes": "allocated_bytes.all.current",
          "mem-max-allocated-bytes": "allocated_bytes.all.peak", "mem-allocated-count": "allocation.all.current"}


@dataclass(frozen=True)
class Curves:
    """Numbers by Megatron-LM's names: `by_samples` are drawn over consumed samples, too, the others over iterations
    alone. `consumed_samples` is None where the ones of the last step are meant.
    """

    by_samples: dict[str, float]
    others: dict[str, float]
    consumed_samples: int | None = None


class StepCurves:
    """The curves of training steps. It keeps the times of steps, whose mean is shown every --log-interval."""

    def __init__(self, run: RunSettings, balance_type: str, world_size: int, device: torch.device):
        self.run, self.balance_type, self.world_size, self.device = run, balance_type, world_size, device
        self._times: list[tuple[float, float | None]] = []

    def of(self, metrics: StepMetrics, batch_size: int, consumed_samples: int) -> Curves | None:
        """Return the curves of a step, None where --tensorboard-log-interval leaves it out."""
        others = self._timers(metrics)
        if metrics.iteration % self.run.tensorboard_log_interval:
            return Curves({}, others, consumed_samples) if others else None
        by_samples = {"learning-rate": metrics.learning_rate, "batch-size": batch_size, "grad-norm": metrics.grad_norm}
        by_samples |= {"lm loss": metrics.lm_loss} if metrics.lm_loss is not None else {}
        by_samples |= {"world-size": self.world_size} if self.run.log_world_size_to_tensorboard else {}
        by_samples |= {"num-zeros": metrics.num_zeros} if metrics.num_zeros is not None else {}
        by_samples |= {"params-norm": metrics.params_norm} if metrics.params_norm is not None else {}
        others |= {f"mtp_{depth} loss": loss for depth, loss in enumerate(metrics.mtp_loss, 1)}
        if metrics.balance_loss is not None:
            others[BALANCE[self.balance_type]] = metrics.balance_loss
        return Curves(by_samples, others | self._memory(), consumed_samples)

    def _timers(self, metrics: StepMetrics) -> dict[str, float]:
        """Return the means since the last line of --log-interval: seconds of an iteration, and TFLOP/s of a rank."""
        if not self.run.log_timers_to_tensorboard:
            return {}
        self._times.append((metrics.step_seconds, metrics.tflops_per_rank))
        if metrics.iteration % self.run.log_interval:
            return {}
        (seconds, speeds), self._times = zip(*self._times), []
        curves = {"iteration-time": sum(seconds) / len(seconds)}
        if self.run.log_throughput:
            curves["throughput"] = sum(speed * time for speed, time in zip(speeds, seconds)) / sum(seconds)
        return curves

    def _memory(self) -> dict[str, float]:
        """Return what this rank's accelerator has given out, in bytes; nothing on a CPU."""
        if not self.run.log_memory_to_tensorboard:
            return {}
        statistics = memory_statistics(self.device)
        return {name: statistics[key] for name, key in MEMORY.items() if key in statistics}


def validation_curves(run: RunSettings, suffix: str, lm_loss: float, mtp_loss: tuple[float, ...]) -> Curves:
    """Return the curves of a validation; `suffix` is that of one set of several."""
    losses = {"lm loss": lm_loss} | {f"mtp_{depth} loss": loss for depth, loss in enumerate(mtp_loss, 1)}
    curves = {f"{name} validation{suffix}": loss for name, loss in losses.items()}
    if run.log_validation_ppl_to_tensorboard:
        curves |= {f"{name} validation{suffix} ppl": perplexity(loss) for name, loss in losses.items()}
    return Curves(curves, {})


def perplexity(loss: float) -> float:
    """Return exp(loss), of a loss of at most 20 as in Megatron-LM."""
    return math.exp(min(20.0, loss))
