"""The counting behind experts' load, on each rank; apart from expert_load.py, which tools read without torch."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.runtime.expert_load import ExpertLoad
from megatron_deepseek.settings import RunSettings


class ExpertCounter:
    """Counts on each rank; all ranks are asked at the same iterations, and rank 0 gets what came of it."""

    def __init__(self, meshes: Meshes, log_interval: int):
        self._meshes, self._interval, self._steps = meshes, log_interval, 0
        self._counts: dict[str, torch.Tensor] = {}

    def after_step(self, iteration: int, counts: Mapping[str, torch.Tensor]) -> ExpertLoad | None:
        """Add a step's counts, int64 [E] by layer of this stage, already those of the global batch.

        Return on rank 0 the load of the steps since the last report, where one is due; None otherwise.
        """
        self._steps += 1
        for name, counts_E in counts.items():
            self._counts[name] = self._counts[name] + counts_E if name in self._counts else counts_E
        if iteration % self._interval:
            return None
        steps, mine, self._steps, self._counts = self._steps, self._counts, 0, {}
        counts = {int(name.split(".")[2]): counts_E.tolist() for name, counts_E in mine.items()}
        together = self._gathered(counts)
        routed = {layer: row for layer, row in sorted(together.items()) if sum(row)}
        return ExpertLoad(iteration, steps, routed) if dist.get_rank() == 0 and routed else None

    def _gathered(self, counts: dict[int, list[int]]) -> dict[int, list[int]]:
        """Return the layers of all stages on pipeline rank 0; of a stage the ranks of pipeline group 0 speak."""
        if self._meshes.layout.pp == 1:
            return counts
        gathered: list[Any] = [None] * self._meshes.layout.pp
        dist.all_gather_object(gathered, counts, group=self._meshes.group("pp"))
        return {layer: row for part in gathered for layer, row in part.items()}


def is_shown(run: RunSettings) -> bool:
    """Return whether anything keeps what is counted: the same on all ranks."""
    return run.save is not None or any(shown is not None for shown in (run.tensorboard_dir, run.wandb_project,
                                                                        run.metrics_file))
