"""The names under which loggers of curves get numbers: train/lm_loss, validation/mtp_loss_1, held out/SET/loss."""

from collections.abc import Iterator, Mapping
from typing import Any


def scalars(group: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, number) for all that is there; a tuple has one for each depth, a mapping for each source."""
    for name, value in values.items():
        if isinstance(value, tuple):
            yield from scalars(group, {f"{name}_{depth}": loss for depth, loss in enumerate(value, start=1)})
        elif isinstance(value, dict):
            yield from scalars(f"{group}/{name}", value)
        elif value is not None and name != "iteration":
            yield f"{group}/{name}", float(value)
