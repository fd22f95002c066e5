"""state.json: where a run is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Where a run is. `iteration` updates are done; the optimizer may have fewer behind it (weights loaded alone).

    `batches`: how these updates were made, (updates, sequences in each) in their order. What is given in iterations is
    then known in samples, whatever batch sizes the run had before. Checkpoints older than this record have none
    (training/timeline.py makes one).
    """

    iteration: int = 0
    consumed_samples: int = 0
    optimizer_steps: int = 0
    batches: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "batches", tuple((updates, size) for updates, size in self.batches))  # JSON has lists

    def after(self, size: int, updated: bool) -> "TrainState":
        """After one more batch of `size` sequences. `updated`: whether weights moved, not only time."""
        *before, (updates, last) = self.batches or ((0, size),)
        batches = (*before, (updates + 1, size)) if size == last else (*self.batches, (1, size))
        return TrainState(self.iteration + 1, self.consumed_samples + size, self.optimizer_steps + updated, batches)
