"""The reference of the KL term: weights that are put into the trainer while it scores, and taken out again.

Beside adapters it is the base, with the adapters off, until it is refreshed. Otherwise each rank keeps its shards of
what is trained in the host's memory and exchanges them with the trainer's. A refreshed reference is saved in
SAVE/reference as weights alone, before the first update that uses it: a run that is resumed finds it there.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.checkpoint.loadable import refuse_damage
from megatron_deepseek.checkpoint.tracker import find_iteration, iteration_directory, iterations
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.finetuning.preference import reference as origin_reference
from megatron_deepseek.model.frozen import trained_parameters
from megatron_deepseek.model.lora import adapters_off
from megatron_deepseek.runtime.saving import saving_group
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer

FOLDER = "reference"  # of --save


class HeldWeights:
    """A copy, in the host's memory, of this rank's shards of what is trained, and of its routers' biases.

    No weights may be gathered when a method is called, so that shards alone are read and changed.
    """

    def __init__(self, stages: Sequence[nn.Module]):
        self._stages = stages
        self._held = [live.to("cpu", copy=True) for live in _shards(stages)]

    def take(self) -> None:
        """Hold what the stages have now."""
        for held, live in zip(self._held, _shards(self._stages)):
            held.copy_(live)

    def exchange(self) -> None:
        """Give the stages what is held, and hold what they had."""
        for held, live in zip(self._held, _shards(self._stages)):
            before = live.to("cpu", copy=True)
            live.copy_(held)
            held.copy_(before)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Let the stages have what is held while the block runs."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()


def _shards(stages: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
    for stage in stages:
        for _, tensor in (*trained_parameters(stage), *stage.named_buffers()):
            own = tensor.detach()
            yield own.to_local() if isinstance(own, DTensor) else own


class Reference:
    """The reference of a run. All ranks make one and call it in the same order.

    `origin`: what the run's first start began from. `tell` gets a line where the reference changes.
    """

    def __init__(self, settings: Settings, trainer: Trainer, origin: str | None, tell: Callable[[str], None]):
        self.settings, self.trainer, self.origin, self.tell = settings, trainer, origin, tell
        self.interval, self.save = settings.reinforcement.reference_refresh_interval, settings.run.save
        self._held: HeldWeights | None = None
        self._group = saving_group(settings.run) if self.interval is not None else None
        self._begun_save: int | None = None

    def resume(self, state: TrainState) -> None:
        """Find the reference of a run that goes on behind `state`. Raise ValueError, on all ranks, if it is missing."""
        begun = self._begun(state.iteration)
        if begun == state.iteration:
            return  # `before_rollout` takes the model of the moment
        if begun is None:
            if self.settings.lora is None:
                self._hold(origin_reference.Reference.of(self.settings, self.origin).load)
            return
        directory = find_iteration(self.save / FOLDER, begun)
        if directory is None:
            raise ValueError(f"--save {self.save} has no {FOLDER} of iteration {begun}, with which the updates behind "
                             f"iteration {state.iteration} go on; a checkpoint of iteration {begun} makes it again")
        refuse_damage(directory, verify(directory) or [])
        self._hold(lambda trainer: checkpoint.load(directory, trainer.stages, None))

    def _begun(self, iteration: int) -> int | None:
        """Return behind which iteration the model became the reference of what follows `iteration`; None: the origin.
        """
        return iteration // self.interval * self.interval or None if self.interval is not None else None

    def _hold(self, load: Callable[[Trainer], None]) -> None:
        """Hold what `load` puts into the trainer, which gets its own weights back."""
        self._held = HeldWeights(self.trainer.stages)
        load(self.trainer)
        self._held.exchange()

    def before_rollout(self, state: TrainState) -> None:
        """Take the model of the moment for the reference where that is due. All ranks call it before each rollout."""
        if state.iteration == 0:
            self._held = HeldWeights(self.trainer.stages) if self.settings.lora is None else None
        elif self._begun(state.iteration) == state.iteration:
            self._held = self._held or HeldWeights(self.trainer.stages)
            self._held.take()
            self._keep(state)
            self.tell(f"iteration {state.iteration}: the reference is the model of this moment from here on")

    def checkpoint_begins(self, iteration: int) -> None:
        """Leave the reference that a checkpoint of `iteration` goes on with, which may be finished much later."""
        self._begun_save = iteration

    def _keep(self, state: TrainState) -> None:
        """Save the trainer's weights as the reference, and remove those that no checkpoint goes on with."""
        if self.save is None:
            return
        folder = self.save / FOLDER
        checkpoint.save(folder, state.without_optimizer(), self.settings.model, self.trainer.stages, None,
                        group=self._group)
        if dist.get_rank() == 0:
            saved = iterations(self.save) + ([self._begun_save] if self._begun_save is not None else [])
            needed = {self._begun(iteration) for iteration in saved} | {state.iteration}
            for iteration in set(iterations(folder)) - needed:
                shutil.rmtree(iteration_directory(folder, iteration), ignore_errors=True)

    @contextmanager
    def in_trainer(self) -> Iterator[None]:
        """Let the trainer compute as the reference while the block runs."""
        with adapters_off(self.trainer.stages) if self._held is None else self._held.exchanged():
            yield
