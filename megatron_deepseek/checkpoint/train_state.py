"""state.json: where a run is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Where a run is. `iteration` updates are done; the optimizer may have fewer behind it (weights loaded alone)."""

    iteration: int = 0
    consumed_samples: int = 0
    optimizer_steps: int = 0
