"""Loading moments when other parameters are frozen now than when the checkpoint was saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_deepseek.checkpoint.job.state import MOMENTS, moment_name
from megatron_deepseek.checkpoint.native import OPTIMIZER
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.frozen import trained_parameters


def moments_of(name: str) -> list[str]:
    """Return the names of a parameter's moments in a checkpoint."""
    return [moment_name(moment, name) for moment in MOMENTS]


@dataclass(frozen=True)
class Subset:
    """The parameters of one rank by name: those that are `trained` now, and those that are `frozen` now.

    `fresh` are the trained ones that were frozen when the checkpoint was saved, so that it has no moments of them.
    """

    trained: frozenset[str]
    fresh: frozenset[str]
    frozen: frozenset[str]

    @classmethod
    def of(cls, stages: Sequence[nn.Module], saved: Mapping[str, Any]) -> "Subset":
        """Compare the parameters of `stages` with the tensors `saved` in a checkpoint.

        A checkpoint without any moments was saved without them, so no parameter is fresh.
        """
        trained = frozenset(name for stage in stages for name, _ in trained_parameters(stage))
        everything = frozenset(name for stage in stages for name, _ in stage.named_parameters())
        fresh = frozenset(name for name in trained if not any(moment in saved for moment in moments_of(name)))
        has_moments = any(name.startswith(OPTIMIZER) for name in saved)
        return cls(trained, fresh if has_moments else frozenset(), everything - trained)

    @property
    def absent(self) -> frozenset[str]:
        """Return the names of the moments that are not there to be loaded."""
        return frozenset(moment for name in self.fresh for moment in moments_of(name))

    @property
    def left(self) -> frozenset[str]:
        """Return the names of the moments that may be there and are not loaded."""
        return frozenset(moment for name in self.frozen for moment in moments_of(name))


def late_parameters(state: TrainState, everyone: Sequence[Subset]) -> tuple[tuple[str, int], ...]:
    """Return `TrainState.late` of a run that goes on from `state` with the subsets of all its ranks.

    A parameter that is frozen now is no longer in it, for its moments are lost.
    """
    trained = frozenset().union(*(of_rank.trained for of_rank in everyone))
    late = {name: first for name, first in state.late if name in trained}
    for of_rank in everyone if state.optimizer_steps else ():
        late |= dict.fromkeys(of_rank.fresh, state.optimizer_steps)
    return tuple(sorted(late.items()))


def set_steps(stages: Sequence[nn.Module], optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Tell the optimizer how many updates of each parameter it has made, which its bias correction depends on."""
    late = dict(state.late)
    for stage in stages:
        for name, parameter in trained_parameters(stage):
            steps = state.optimizer_steps - late.get(name, 0)
            optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
