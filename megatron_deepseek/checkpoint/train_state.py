"""state.json: how far a run is, in iterations, samples and optimizer steps."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_deepseek.foreign_json import JsonObject, read_object

STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """How far a run is. `iteration` updates are done; the optimizer may have fewer behind it (weights loaded alone).

    `batches` are the past batch sizes in their order, as (number of updates, sequences in each). With them a setting
    in iterations is known in samples too, whatever batch sizes the run had before. Checkpoints of older versions have
    none; training/timeline.py then makes them up.

    `late` names the parameters that were frozen at first, each with the optimizer steps made before it was trained.
    """

    iteration: int = 0
    consumed_samples: int = 0
    optimizer_steps: int = 0
    batches: tuple[tuple[int, int], ...] = ()
    late: tuple[tuple[str, int], ...] = ()

    def after(self, size: int, updated: bool) -> "TrainState":
        """Return the state after one more batch of `size` sequences; `updated` says whether the weights changed."""
        *before, (updates, last) = self.batches or ((0, size),)
        batches = (*before, (updates + 1, size)) if size == last else (*self.batches, (1, size))
        return TrainState(self.iteration + 1, self.consumed_samples + size, self.optimizer_steps + updated, batches,
                          self.late)

    def without_optimizer(self) -> "TrainState":
        """Return the state of a checkpoint with the same weights and no optimizer state."""
        return replace(self, optimizer_steps=0, late=())

    def to_json(self) -> dict[str, Any]:
        """Return the content of state.json.

        `late` is left out if there are no such parameters, so that older versions, which refuse it, can load the rest.
        """
        fields = asdict(self)
        return fields if self.late else {name: value for name, value in fields.items() if name != "late"}


_NUMBERS = ("iteration", "consumed_samples", "optimizer_steps")


def read_state(directory: Path) -> TrainState:
    """Read state.json of a checkpoint's directory.

    Raise ValueError unless the three numbers are there, none negative, with `batches` and `late` at most. Every version
    has written the numbers, so one that is missing was lost. An unknown key may mean something that a run must not
    ignore. Older versions wrote no `batches`, and `late` is written only if needed.
    """
    found = read_object(directory / STATE)
    found.only(*_NUMBERS, "batches", "late")
    state = TrainState(**{name: found.integer(name) for name in _NUMBERS}, batches=_batches(found), late=_late(found))
    if state.optimizer_steps > state.iteration:
        raise found.fault("optimizer_steps", f"more than the {state.iteration} of iteration")
    return state


def _late(found: JsonObject) -> tuple[tuple[str, int], ...]:
    """Return `late`; raise ValueError unless each is a parameter with a number of steps that were made."""
    written, steps = found.list("late", default=[]), found.integer("optimizer_steps")
    late = tuple(tuple(each) for each in written if isinstance(each, list) and len(each) == 2)
    if len(late) < len(written) or not all(
            isinstance(name, str) and type(first) is int and 0 < first <= steps for name, first in late):
        raise found.fault("late", f"not pairs of a parameter and a number of the {steps} optimizer steps")
    return late


def _batches(found: JsonObject) -> tuple[tuple[int, int], ...]:
    """Return `batches`; raise ValueError unless they add up to the iteration and the samples, or are not there."""
    written = found.list("batches", default=[])
    batches = tuple(tuple(run) for run in written if isinstance(run, list) and len(run) == 2)
    if len(batches) < len(written) or not all(type(number) is int and number > 0 for run in batches for number in run):
        raise found.fault("batches", "not pairs of updates and sequences")
    sums = sum(updates for updates, _ in batches), sum(updates * size for updates, size in batches)
    if written and sums != (found.integer("iteration"), found.integer("consumed_samples")):
        raise found.fault("batches", f"which come to {sums[0]} updates and {sums[1]} samples, not iteration and "
                                       "consumed_samples")
    return batches
