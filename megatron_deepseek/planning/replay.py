"""The most that a rank takes at once beside what stands all the time, found by going through its list of actions.

A forward adds what its backward will need. A whole backward ends with all of that free; one of input gradients keeps
what the weight gradients need until those are made. While a forward or a backward runs it needs more for a moment: a
layer that is recomputed, gradients on their way, logits. Gathered weights and gradients of a stage come and go with its
first and last acts (phases.py).

The two runs of a pair follow each other, or take turns: each computes until it begins to exchange rows with other ranks
(parallel/micro_batch_overlap.py). So one is at its peak while the other waits at an exchange.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from megatron_deepseek.planning.actions import Act
from megatron_deepseek.planning.phases import BEFORE, PHASES, Turn, turns


class Piece(NamedTuple):
    """What a run takes from one of its exchanges to the next, beside what stood before it: `most`, and what it has
    `left` in the end. `weights` of the former, and `weights_left` of the latter, are gathered, or freed if negative.
    """

    most: float
    weights: float = 0
    left: float = 0
    weights_left: float = 0

    @property
    def rounded(self) -> "Piece":
        """Return the same in whole bytes."""
        return Piece(*map(round, self))


@dataclass(frozen=True)
class StageBytes:
    """What one micro-batch takes on one stage, in bytes, and the stage's own weights and gradients.

    `kept` from its forward to its backward; `waiting` of input gradients' backward is left until the weight gradients
    are made; `forward`, `backward` and `weights` exist beside it only while forwards, backwards and the making of
    weight gradients run, but for the turns that `in_turn` has other bytes for. `states`: gathered weights and gradients
    in each phase; `gathers`: the weights among a turn's bytes, which are gathered for the moment. `pieces`: those of
    turns that another run takes turns with. `arriving` and `returning`: what is received for a forward and for a
    backward.
    """

    kept: int = 0
    waiting: int = 0
    forward: int = 0
    backward: int = 0
    weights: int = 0
    states: tuple[int, ...] = (0,) * len(PHASES)
    in_turn: Mapping[Turn, int] = field(default_factory=dict)
    gathers: Mapping[Turn, int] = field(default_factory=dict)
    pieces: Mapping[Turn, Sequence[Piece]] = field(default_factory=dict)
    arriving: int = 0
    returning: int = 0

    def running(self, turn: Turn) -> int:
        """Return the bytes that a run has beside what stands before it; of a forward, weights that it gathers too."""
        if turn in self.in_turn:
            return self.in_turn[turn]
        if turn.kind == "F":
            return self.forward + self.states[turn.after] - self.states[turn.before]
        return self.weights if turn.kind == "W" else self.backward

    def in_pieces(self, turn: Turn) -> Sequence[Piece]:
        """Return the pieces of a run of a pair; what a forward keeps is counted from the beginning."""
        pieces = self.pieces.get(turn) or (Piece(self.running(turn), self.gathers.get(turn, 0)),)
        change = self.states[turn.after] - self.states[turn.before]
        end = dict(left=change, weights_left=change) if turn.kind == "F" else dict(left=change - self.kept)
        return *pieces[:-1], pieces[-1]._replace(**end)


@dataclass(frozen=True)
class Peak:
    """The most bytes, in which act of the list, how many micro-batches each stage keeps at that moment, in which phase
    each is, and the parts that the bytes are the sum of: kept, waiting, gathered weights and gradients, what has
    arrived, and what exists only while the act runs, `gathered` of which are weights.
    """

    bytes: int = 0
    act: int = 0
    in_flight: Mapping[int, int] = field(default_factory=dict)
    kept: int = 0
    waiting: int = 0
    running: int = 0
    states: int = 0
    arrived: int = 0
    gathered: int = 0
    phases: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """For each stage, in the order of a rank's stages: how many micro-batches are kept, how many wait for weight
    gradients, its phase, and how many hidden states and gradients have arrived for it.
    """

    kept: tuple[int, ...]
    waiting: tuple[int, ...]
    phases: tuple[int, ...]
    arrived: tuple[tuple[int, int], ...]

    def bytes(self, stages: Sequence[StageBytes]) -> tuple[int, int, int, int]:
        """Return the bytes that are kept, that wait, that are weights and gradients, and that have arrived."""
        return (sum(count * each.kept for count, each in zip(self.kept, stages)),
                sum(count * each.waiting for count, each in zip(self.waiting, stages)),
                sum(each.states[phase] for phase, each in zip(self.phases, stages)),
                sum(hidden * each.arriving + gradients * each.returning
                    for (hidden, gradients), each in zip(self.arrived, stages)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Return all that is counted, but for phases."""
        return (*self.kept, *self.waiting, *(count for pair in self.arrived for count in pair))


@dataclass(frozen=True)
class Moment:
    """An act: what stands while it runs, and its runs: which stage, in which turn. `after`: what stands behind it."""

    during: Standing
    runs: tuple[tuple[int, Turn], ...]
    after: Standing

    def bytes(self, stages: Sequence[StageBytes], together: bool = True) -> tuple[int, int, int, int, int]:
        """Return the bytes of what stands, and those that exist only while the act runs. `together`: the two runs of a
        pair are at their peaks at once; otherwise they take turns.
        """
        return *self.during.bytes(stages), self.running(stages, together)[0]

    def gathered(self, stages: Sequence[StageBytes], together: bool = True) -> int:
        """Return how many of the bytes that exist only while the act runs are weights."""
        return self.running(stages, together)[1]

    def running(self, stages: Sequence[StageBytes], together: bool) -> tuple[int, int]:
        """Return the bytes that exist only while the act runs, and how many of them are weights: the same in every act
        of these runs.
        """
        if len(self.runs) == 2 and not together:
            return taking_turns(*(stages[at].in_pieces(turn) for at, turn in self.runs))
        return (sum(stages[at].running(turn) for at, turn in self.runs),
                sum(stages[at].gathers.get(turn, 0) for at, turn in self.runs))


def taking_turns(one: Sequence[Piece], other: Sequence[Piece]) -> tuple[int, int]:
    """Return the most bytes of two runs, and how many of them are weights: they do a piece each, `one` first, until one
    of them has ended.
    """
    found, left = [], [(0, 0), (0, 0)]
    for pieces in zip_longest(one, other):
        for me, piece in enumerate(pieces):
            if piece is not None:
                bytes_there, weights_there = left[1 - me]
                found.append((piece.most + bytes_there, piece.weights + weights_there))
                left[me] = piece.left, piece.weights_left
    return max(found)


def moments(acts: Sequence[Act], stages: Sequence[int], arrived: Sequence | None = None, regathers: bool = False
            ) -> Iterator[Moment]:
    """Yield a Moment for each act of a rank that holds `stages`. `arrived`: what has arrived in each act
    (arrivals.py), None for nothing; `regathers`: weights come and go (phases.py).

    The forward of a pair is kept before its backward frees anything.
    """
    place, nothing = {stage: at for at, stage in enumerate(stages)}, ((0, 0),) * len(stages)
    kept, waiting, phases = [0] * len(place), [0] * len(place), [BEFORE] * len(place)
    for number, (act, of_act) in enumerate(zip(acts, turns(acts, regathers))):
        there = arrived[number] if arrived else nothing
        for run in act:
            kept[place[run.stage]] += run.kind == "F"
        during = Standing(tuple(kept), tuple(waiting), tuple(phases), there)
        for run, turn in zip(act, of_act):
            kept[place[run.stage]] -= run.kind in "BI"
            waiting[place[run.stage]] += (run.kind == "I") - (run.kind == "W")
            phases[place[run.stage]] = turn.after
        runs = tuple((place[run.stage], turn) for run, turn in zip(act, of_act))
        yield Moment(during, runs, Standing(tuple(kept), tuple(waiting), tuple(phases), nothing))
    assert not any(kept) and not any(waiting), "a micro-batch without its backward"


def replay(acts: Sequence[Act], stages: Mapping[int, StageBytes], together: bool = True,
           arrived: Sequence | None = None, regathers: bool = False) -> Peak:
    """Return the peak of a rank that does `acts` on `stages`; `together`: the runs of pairs at once."""
    best = Peak()
    order, sizes = tuple(stages), tuple(stages.values())
    for number, moment in enumerate(moments(acts, order, arrived, regathers)):
        held, left, states, there, running = moment.bytes(sizes, together)
        if held + left + states + there + running > best.bytes:
            best = Peak(held + left + states + there + running, number,
                        {s: count for s, count in zip(order, moment.during.kept) if count}, held, left, running, states,
                        there, moment.gathered(sizes, together), dict(zip(order, moment.during.phases)))
    return best


def levels(acts: Sequence[Act], stages: Mapping[int, StageBytes], together: bool = True,
           arrived: Sequence | None = None, regathers: bool = False) -> Iterator[tuple[int, int]]:
    """Yield for each act the bytes while it runs and those behind it."""
    sizes = tuple(stages.values())
    for moment in moments(acts, tuple(stages), arrived, regathers):
        yield sum(moment.bytes(sizes, together)), sum(moment.after.bytes(sizes))


def most_in_flight(acts: Sequence[Act], stages: Sequence[int]) -> int:
    """Return how many forwards of any of `stages` wait for the end of their backward at the same time, at most."""
    return replay(acts, {stage: StageBytes(kept=1, waiting=1) for stage in stages}).bytes
