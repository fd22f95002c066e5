"""Who is told when a pipeline begins and ends each act: the forward or a backward of one micro-batch on one stage.

Nobody, in a training. A dry run is told, to say at which act memory is fullest and in which act a collective runs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol


class Act(NamedTuple):
    """`kind`: "F" forward, "B" whole backward, "I" backward of inputs alone, "W" weight gradients that were left."""

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} of stage {self.stage}"


class Watch(Protocol):
    """Returns a context manager that is entered before an act and left behind it, in the thread that does the act."""

    def __call__(self, act: Act) -> AbstractContextManager: ...


def unwatched(act: Act) -> AbstractContextManager:
    """Tell nobody."""
    return nullcontext()
