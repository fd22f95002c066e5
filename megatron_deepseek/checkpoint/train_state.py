"""state.json: where a run is."""

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_deepseek.foreign_json import read_object

STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run is. `iteration` updates are done; the optimizer may have fewer behind it (weights loaded alone)."""

    iteration: int = 0
    consumed_samples: int = 0
    optimizer_steps: int = 0


def read_state(directory: Path) -> TrainState:
    """Of a checkpoint's directory. ValueError unless state.json has these numbers, none negative, and nothing else.

    Every version has written all three, so one that is missing was lost; and a key that is unknown here may mean
    something that a run must not go on without.
    """
    found, names = read_object(directory / STATE), [field.name for field in fields(TrainState)]
    found.only(*names)
    state = TrainState(**{name: found.integer(name) for name in names})
    if state.optimizer_steps > state.iteration:
        raise found.refusal("optimizer_steps", f"more than the {state.iteration} of iteration")
    return state
