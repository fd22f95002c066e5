"""How far a stage is in a step, as far as its weights and gradients are concerned: they come and go with its acts.

    BEFORE     none of its forwards has begun
    GATHERED   its weights are there, whole
    BEGUN      beside them the sums of those gradients that a backward of the inputs makes too: of what is no product
    SUMMED     the sums of all its gradients
    REDUCED    its last backward is over: reduced gradients alone

Its first backward makes the sums layer by layer, from the last one up, and its last one reduces and frees them in that
order. What a backward takes depends on which of these it is: on the phases before and behind it, its turn.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_deepseek.planning.actions import Act, Run

BEFORE, GATHERED, BEGUN, SUMMED, REDUCED = PHASES = range(5)


class Turn(NamedTuple):
    """The kind of a run (planning/actions.py), and the phases of its stage before and behind it."""

    kind: str
    before: int
    after: int


FIRST, MIDDLE, LAST, ONLY = ((GATHERED, SUMMED), (SUMMED, SUMMED), (SUMMED, REDUCED), (GATHERED, REDUCED))
BACKWARDS = (FIRST, MIDDLE, LAST, ONLY, (BEGUN, SUMMED), (BEGUN, REDUCED))  # (before, after) of whole ones and of W


def turns(acts: Sequence[Act]) -> Iterator[tuple[Turn, ...]]:
    """Yield the turns of each act's runs."""
    ends = {run.stage: run for act in acts for run in act if run.kind in "BW"}
    phases = dict.fromkeys((run.stage for act in acts for run in act), BEFORE)
    for act in acts:
        found = []
        for run in act:
            before = phases[run.stage]
            phases[run.stage] = _behind(run, before, run == ends.get(run.stage))
            found.append(Turn(run.kind, before, phases[run.stage]))
        yield tuple(found)


def _behind(run: Run, before: int, ends: bool) -> int:
    if run.kind == "F":
        return max(before, GATHERED)
    if run.kind == "I":
        return max(before, BEGUN)
    return REDUCED if ends else SUMMED
