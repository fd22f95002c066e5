"""How far a stage is in a step, as far as its weights and gradients are concerned: they come and go with its acts.

    BEFORE     none of its forwards has begun
    GATHERED   its weights are there, whole
    BEGUN      beside them the sums of those gradients that a backward of the inputs makes too: of what is no product
    SUMMED     the sums of all its gradients
    REDUCED    its last backward is over: reduced gradients alone

Where weights are gathered by the layer and weight gradients are made apart, a forward frees the weights, and a backward
of the inputs gathers them until the next forward (`regathers`). GATHERED then has none, and there are two more:

    FREED_BEGUN, FREED_SUMMED    as BEGUN and SUMMED, but a forward has freed the weights since

Its first backward makes the sums layer by layer, from the last one up, and its last one reduces and frees them in that
order. What a backward takes depends on which of these it is: on the phases before and behind it, its turn.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_deepseek.planning.actions import Act, Run

BEFORE, GATHERED, BEGUN, SUMMED, REDUCED, FREED_BEGUN, FREED_SUMMED = PHASES = range(7)
FREED = {BEGUN: FREED_BEGUN, SUMMED: FREED_SUMMED}  # by a forward
KEPT = {freed: phase for phase, freed in FREED.items()}  # the same phases with weights
FREED_BY_FORWARDS = (GATHERED, FREED_BEGUN, FREED_SUMMED)  # phases without weights, where forwards free them


class Turn(NamedTuple):
    """The kind of a run (planning/actions.py), and the phases of its stage before and behind it."""

    kind: str
    before: int
    after: int


FIRST, MIDDLE, LAST, ONLY = ((GATHERED, SUMMED), (SUMMED, SUMMED), (SUMMED, REDUCED), (GATHERED, REDUCED))


def turns(acts: Sequence[Act], regathers: bool = False) -> Iterator[tuple[Turn, ...]]:
    """Yield the turns of each act's runs."""
    ends = {run.stage: run for act in acts for run in act if run.kind in "BW"}
    phases = dict.fromkeys((run.stage for act in acts for run in act), BEFORE)
    for act in acts:
        found = []
        for run in act:
            before = phases[run.stage]
            phases[run.stage] = _behind(run, before, run == ends.get(run.stage), regathers)
            found.append(Turn(run.kind, before, phases[run.stage]))
        yield tuple(found)


def _behind(run: Run, before: int, ends: bool, regathers: bool) -> int:
    if run.kind == "F":
        return FREED[before] if regathers and before in FREED else max(before, GATHERED)
    if run.kind == "I":
        return max(KEPT.get(before, before), BEGUN)
    if ends:
        return REDUCED
    return FREED_SUMMED if run.kind == "W" and before in KEPT else SUMMED
