"""A rollout between its updates, and the file of a checkpoint in which it waits for those that are still to come."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.rl.samples import Sample

FILE = "rollout.pt"  # of a checkpoint's directory


@dataclass(frozen=True, eq=False)
class Rollout:
    """The samples of a rollout, and what its updates know of them.

    `number`: in the run, from 0. `iteration`: behind which it was made. `used`: prompts that the run has asked with it.
    `updates`: of each, the places of its samples. `advantages`: of the samples. `old`, `reference`: of each sample the
    log-probabilities of its tokens, float64, by the model that made it and by the reference; None if not needed.
    """

    number: int
    iteration: int
    used: int
    updates: tuple[tuple[int, ...], ...]
    samples: tuple[Sample, ...] = ()
    advantages: tuple[float, ...] = ()
    old: tuple[torch.Tensor, ...] | None = None
    reference: tuple[torch.Tensor, ...] | None = None

    def is_over(self, iteration: int) -> bool:
        """Return whether no update is left behind `iteration`."""
        return iteration >= self.iteration + len(self.updates)


def write_rollout(rollout: Rollout, iteration: int, directory: Path) -> None:
    """Write what a run that goes on behind `iteration` needs of `rollout`: without samples if no update is left."""
    if rollout.is_over(iteration):
        rollout = Rollout(rollout.number, rollout.iteration, rollout.used, ((),) * len(rollout.updates))
    torch.save(_plain(rollout) | {"samples": [_plain(each) for each in rollout.samples]}, directory / FILE)


def read_rollout(directory: Path) -> Rollout:
    """Return the rollout of a checkpoint. Raise ValueError, in one line, for a file that is missing or damaged."""
    path = directory / FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no {FILE}: it is no checkpoint of reinforcement learning; --finetune begins "
                         "from its weights")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return Rollout(**found | {"samples": tuple(Sample(**each) for each in found["samples"])})
    except Exception as error:  # what the unpickler meets in a torn file is of many classes
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _plain(record: Rollout | Sample) -> dict[str, Any]:
    """Return the fields of a record by name."""
    found = {each.name: getattr(record, each.name) for each in fields(record)}
    return found | ({"experts": dict(found["experts"])} if found.get("experts") is not None else {})
