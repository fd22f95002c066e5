"""When each rank of a pipeline does what, from its list of actions and how long each takes.

An act begins as soon as its rank is free and what it needs of other stages has arrived. Nothing else is assumed:
bubbles come out of the lists (actions.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_deepseek.planning.actions import Act, Run


@dataclass(frozen=True)
class Span:
    """When an act begins and ends; `waits` is how long its rank was idle before it."""

    start: float
    end: float
    waits: float


def no_hop(run: Run) -> float:
    """Return 0: what a stage makes is at the next one's rank at once."""
    return 0.0


def simulate(acts: list[list[Act]], duration: Callable[[int, Act], float], last_stage: int,
             hop: Callable[[Run], float] = no_hop) -> list[list[Span]]:
    """Return a Span for each act of each rank. `duration(rank, act)` and `hop(run)`, the time until what `run` made is
    with the stage that waits for it, are in any one unit.

    Raises AssertionError if the ranks wait for each other for ever.
    """
    ended: dict[Run, float] = {}
    spans: list[list[Span]] = [[] for _ in acts]
    blocked = set(range(len(acts)))
    while blocked:
        progress = False
        for rank in list(blocked):
            progress |= _advance(rank, acts[rank], spans[rank], ended, duration, last_stage, hop)
            if len(spans[rank]) == len(acts[rank]):
                blocked.discard(rank)
        assert progress, "the ranks wait for each other for ever"
    return spans


def _advance(rank: int, acts: list[Act], spans: list[Span], ended: dict[Run, float], duration, last_stage: int, hop
             ) -> bool:
    """Do as many of the rank's next acts as have what they need; return whether there was any."""
    before = len(spans)
    for act in acts[before:]:
        free, start = spans[-1].end if spans else 0.0, 0.0
        for run in act:
            needed = needs(run, last_stage, ended)
            if needed is not None and needed not in ended:
                return len(spans) > before
            start = start if needed is None else max(start, ended[needed] + hop(needed))
        start = max(start, free)
        end = start + duration(rank, act)
        spans.append(Span(start, end, start - free))
        for run in act:
            ended[run] = end
    return len(spans) > before


def needs(run: Run, last_stage: int, ended: dict[Run, float]) -> Run | None:
    """Return the run of another stage that `run` waits for; what it needs of its own stage, its rank's order sees to.

    A backward waits for the later stage's whole one or its input gradients, whichever that stage does.
    """
    if run.kind == "F":
        return Run("F", run.stage - 1, run.micro_batch) if run.stage else None
    if run.kind == "W" or run.stage == last_stage:
        return None
    whole = Run("B", run.stage + 1, run.micro_batch)
    return whole if whole in ended else Run("I", run.stage + 1, run.micro_batch)
