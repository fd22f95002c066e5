"""Watches over the health of a run: losses and gradients that are not finite, masked labels, and losses that jump.

A NaN spreads to everything that it is added to, so after a step every gradient may be NaN on every rank. The origin is
found by looking at the causes in order: a weight that is not finite; else, in a second forward, the first module whose
output is not; else the first gradient of the backward that is not.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.training.trainer import StepResult, Trainer


@dataclass(frozen=True, order=True)
class Finding:
    """Something that is not finite. `order`: 0 for a weight, 1 for an output, 2 for a gradient.

    Findings sort by `order`, then by the stage; the least is the origin. Stages of gradients are negative, since the
    backward begins at the last stage.
    """

    order: int
    stage: int
    rank: int
    text: str


class NotFinite:
    """The policy for steps that are not finite: "stop" the run, or "skip" the step and stop after `most` in a row.

    Every rank sees the same steps, so all decide alike.
    """

    def __init__(self, policy: str, most: int):
        self.policy, self.most, self.skipped = policy, most, 0

    def check(self, iteration: int, result: StepResult, origin: Callable[[], str]) -> str | None:
        """Return None for a healthy step, a line for a skipped one. Raise FloatingPointError if the run must stop."""
        if result.updated:
            self.skipped = 0
            return None
        self.skipped += 1
        losses = result.losses
        reported = iter(losses.reports.items())
        named = [*islice(reported, 1), *((name, loss) for name, loss in reported if not math.isfinite(loss))]
        told = "".join(f"{name} {loss:g}, " for name, loss in named)
        what = f"iteration {iteration}: {told}gradient norm {result.grad_norm:g}; {origin()}"
        if self.policy == "stop":
            raise FloatingPointError(f"{what}. The weights are as they were before this step; --nan-policy skip would "
                                     "leave such batches out")
        if self.skipped > self.most:
            raise FloatingPointError(f"{what}. {self.skipped} steps in a row were not finite, --nan-policy skip "
                                     f"allows {self.most}")
        return f"{what}. Skipped: weights and moments are as before, its samples count as read"


def find_origin(trainer: Trainer, batch: Batch) -> str:
    """Say where, and on which rank, the step on `batch` was first not finite.

    Every rank calls it right after the step, whose gradients it looks at. It runs the forward again.
    """
    outputs: list[str] = []
    with ExitStack() as stack:
        for index, stage in zip(trainer.indices, trainer.stages):
            stack.enter_context(_watched(index, stage, outputs))
        trainer.evaluate(batch)
    rank = dist.get_rank()
    own = [Finding(0, index, rank, f"the weight {name} is not finite") for index, name in _bad_weights(trainer)]
    own += [Finding(1, index, rank, f"the output of {name} is not finite") for index, name in outputs[:1]]
    own += [Finding(2, -index, rank, f"the gradient of {name} is not finite")
            for index, name in _bad_gradients(trainer)]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, min(own, default=None))
    found = sorted(finding for finding in everyone if finding is not None)
    if not found:
        return "a second forward and all gradients of single ranks are finite: only a sum over ranks is not"
    same = [finding.rank for finding in found if finding.text == found[0].text]
    return f"rank{'s' * (len(same) > 1)} {', '.join(map(str, same))}: {found[0].text}"


def _bad_weights(trainer: Trainer) -> Iterator[tuple[int, str]]:
    for index, stage in zip(trainer.indices, trainer.stages):
        for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
            if not _finite(tensor):
                yield index, name
                break


def _bad_gradients(trainer: Trainer) -> Iterator[tuple[int, str]]:
    """Yield each stage's last bad parameter in the order of the forward: the backward came to it first."""
    for index, stage in zip(trainer.indices, trainer.stages):
        bad = [name for name, parameter in stage.named_parameters()
               if parameter.grad is not None and not _finite(parameter.grad)]
        if bad:
            yield index, bad[-1]


@contextmanager
def _watched(index: int, stage: nn.Module, found: list) -> Iterator[None]:
    """Collect in `found` the (stage, module name) of outputs that are not finite, innermost modules first."""

    def watch(name: str) -> Callable:
        return lambda module, args, output: None if _all_finite(output) else found.append((index, name))

    handles = [module.register_forward_hook(watch(name)) for name, module in stage.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _all_finite(output) -> bool:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return all(_finite(part) for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point())


def _finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local.detach()).all())


class LabelWatch:
    """A watch for batches whose labels are all masked: a loss of 0 looks like a success, and nothing is learned."""

    def __init__(self):
        self.first: int | None = None

    def see(self, iteration: int, num_labels: int) -> str | None:
        """Return a line at the first of a stretch of such batches, and one when it is over; else None."""
        if num_labels:
            first, self.first = self.first, None
            return None if first is None else \
                f"iteration {iteration}: there are labels again, for the first time since iteration {first}"
        if self.first is not None:
            return None
        self.first = iteration
        return (f"iteration {iteration}: all labels of the batch are masked; its loss is 0, and nothing is learned "
                "from it")


class SpikeWatch:
    """A watch for losses that jump: far above the median of the last steps, measured by their spread.

    A spike is more than `factor` standard deviations above the median of the last `window` losses, where the deviation
    is 1.4826 times the median distance from the median (so that the spikes themselves do not widen it), and at least
    1 % of the median. The first `fewest` losses are only collected.
    """

    def __init__(self, window: int = 32, fewest: int = 16, factor: float = 6.0):
        self.losses: deque[float] = deque(maxlen=window)
        self.fewest, self.factor = fewest, factor

    def see(self, iteration: int, loss: float) -> str | None:
        """Return a line if `loss` is a spike, else None. A loss that is not finite is left to `NotFinite`."""
        if not math.isfinite(loss):
            return None
        line = self._line(iteration, loss) if len(self.losses) >= self.fewest else None
        self.losses.append(loss)
        return line

    def _line(self, iteration: int, loss: float) -> str | None:
        middle = median(self.losses)
        deviation = max(1.4826 * median(abs(each - middle) for each in self.losses), 0.01 * abs(middle))
        if loss <= middle + self.factor * deviation:
            return None
        return (f"iteration {iteration}: lm_loss {loss:.4f} is a spike, {(loss - middle) / deviation:.0f} deviations "
                f"above the median {middle:.4f} of the last {len(self.losses)} steps")
