"""The most that a rank's activations take at once, found by going through its list of actions.

A forward adds what its backward will need. A whole backward ends with all of that free; one of input gradients keeps
what the weight gradients need until those are made. While a forward or a backward runs it needs more for a moment: a
layer that is recomputed, gradients on their way, logits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_deepseek.planning.actions import Act


@dataclass(frozen=True)
class StageBytes:
    """What one micro-batch takes on one stage, in bytes.

    `kept` from its forward to its backward; `waiting` of input gradients' backward is left until the weight gradients
    are made; `forward`, `backward` and `weights` exist beside it only while forwards, backwards and the making of
    weight gradients run.
    """

    kept: int = 0
    waiting: int = 0
    forward: int = 0
    backward: int = 0
    weights: int = 0


@dataclass(frozen=True)
class Peak:
    """The most bytes, in which act of the list, how many micro-batches each stage keeps at that moment, and the parts
    that the bytes are the sum of: kept, waiting, and what exists only while the act runs.
    """

    bytes: int = 0
    act: int = 0
    in_flight: Mapping[int, int] = field(default_factory=dict)
    kept: int = 0
    waiting: int = 0
    running: int = 0


@dataclass(frozen=True)
class Moment:
    """An act: how many micro-batches each stage keeps while it runs, how many wait for weight gradients, and which
    stages run forwards, which backwards and which make weight gradients, all in the order of `stages`. `after`: what is
    kept and waits behind it.
    """

    kept: tuple[int, ...]
    waiting: tuple[int, ...]
    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    weights: tuple[int, ...]
    after: tuple[tuple[int, ...], tuple[int, ...]]

    def bytes(self, stages: Sequence[StageBytes], together: bool = True) -> tuple[int, int, int]:
        """Return the bytes that are kept, that wait, and that exist only while the act runs. `together`: the two runs
        of a pair are at their peaks at once; otherwise one follows the other.
        """
        running = [*(stages[at].forward for at in self.forwards), *(stages[at].backward for at in self.backwards),
                   *(stages[at].weights for at in self.weights)]
        return *standing(self.kept, self.waiting, stages), sum(running) if together else max(running)


def standing(kept: Sequence[int], waiting: Sequence[int], stages: Sequence[StageBytes]) -> tuple[int, int]:
    """Return the bytes of so many micro-batches that are kept and that wait."""
    return (sum(count * each.kept for count, each in zip(kept, stages)),
            sum(count * each.waiting for count, each in zip(waiting, stages)))


def moments(acts: Sequence[Act], stages: Sequence[int]) -> Iterator[Moment]:
    """Yield a Moment for each act of a rank that holds `stages`.

    The forward of a pair is kept before its backward frees anything.
    """
    place = {stage: at for at, stage in enumerate(stages)}
    kept, waiting = [0] * len(place), [0] * len(place)
    for act in acts:
        for run in act:
            kept[place[run.stage]] += run.kind == "F"
        during = tuple(kept), tuple(waiting)
        for run in act:
            kept[place[run.stage]] -= run.kind in "BI"
            waiting[place[run.stage]] += (run.kind == "I") - (run.kind == "W")
        runs = [tuple(place[run.stage] for run in act if run.kind in kinds) for kinds in ("F", "BI", "W")]
        yield Moment(*during, *runs, (tuple(kept), tuple(waiting)))
    assert not any(kept) and not any(waiting), "a micro-batch without its backward"


def replay(acts: Sequence[Act], stages: Mapping[int, StageBytes], together: bool = True) -> Peak:
    """Return the peak of a rank that does `acts` on `stages`; `together`: the runs of pairs at once."""
    best = Peak()
    order, sizes = tuple(stages), tuple(stages.values())
    for number, moment in enumerate(moments(acts, order)):
        held, left, running = moment.bytes(sizes, together)
        if held + left + running > best.bytes:
            best = Peak(held + left + running, number, {s: count for s, count in zip(order, moment.kept) if count},
                        held, left, running)
    return best


def levels(acts: Sequence[Act], stages: Mapping[int, StageBytes], together: bool = True) -> Iterator[tuple[int, int]]:
    """Yield for each act the bytes while it runs and those behind it."""
    sizes = tuple(stages.values())
    for moment in moments(acts, tuple(stages)):
        yield sum(moment.bytes(sizes, together)), sum(standing(*moment.after, sizes))


def most_in_flight(acts: Sequence[Act], stages: Sequence[int]) -> int:
    """Return how many forwards of any of `stages` wait for the end of their backward at the same time, at most."""
    return replay(acts, {stage: StageBytes(kept=1, waiting=1) for stage in stages}).bytes
