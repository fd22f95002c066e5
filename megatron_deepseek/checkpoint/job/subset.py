"""A checkpoint's moments are of the parameters that were trained when it was saved, which may be others than now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_deepseek.checkpoint.job.state import MOMENTS
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.frozen import trained_parameters


def moments_of(name: str) -> list[str]:
    """What a checkpoint calls the moments of the parameter `name`."""
    return [f"optimizer.{moment}.{name}" for moment in MOMENTS]


@dataclass(frozen=True)
class Subset:
    """Parameters of one rank: `trained` now, those of them that are `fresh`, frozen when the checkpoint was saved, and
    those that are frozen now.
    """

    trained: frozenset[str]
    fresh: frozenset[str]
    frozen: frozenset[str]

    @classmethod
    def of(cls, stages: Sequence[nn.Module], saved: Mapping[str, Any]) -> "Subset":
        """`saved`: the tensors of a checkpoint. If it has no moments at all they were not saved, and none is fresh."""
        trained = frozenset(name for stage in stages for name, _ in trained_parameters(stage))
        everything = frozenset(name for stage in stages for name, _ in stage.named_parameters())
        fresh = frozenset(name for name in trained if not any(moment in saved for moment in moments_of(name)))
        has_moments = any(name.startswith("optimizer.") for name in saved)
        return cls(trained, fresh if has_moments else frozenset(), everything - trained)

    @property
    def absent(self) -> frozenset[str]:
        """Moments that are not there to be loaded."""
        return frozenset(moment for name in self.fresh for moment in moments_of(name))

    @property
    def left(self) -> frozenset[str]:
        """Moments that may be there and are not loaded."""
        return frozenset(moment for name in self.frozen for moment in moments_of(name))


def late_parameters(state: TrainState, everyone: Sequence[Subset]) -> tuple[tuple[str, int], ...]:
    """`TrainState.late` of a run that goes on from `state` with these subsets on its ranks. A parameter that is frozen
    now loses its place there with its moments.
    """
    trained = frozenset().union(*(of_rank.trained for of_rank in everyone))
    late = {name: first for name, first in state.late if name in trained}
    for of_rank in everyone if state.optimizer_steps else ():
        late |= dict.fromkeys(of_rank.fresh, state.optimizer_steps)
    return tuple(sorted(late.items()))


def set_steps(stages: Sequence[nn.Module], optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """How many updates of each parameter the optimizer has behind it, which its bias correction is made of."""
    late = dict(state.late)
    for stage in stages:
        for name, parameter in trained_parameters(stage):
            steps = state.optimizer_steps - late.get(name, 0)
            optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
