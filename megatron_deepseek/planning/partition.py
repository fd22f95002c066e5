"""Cut a model into stages by an exact dynamic program: the fastest cut of those whose every rank has room.

A pipeline runs at the pace of its busiest rank. Of all cuts into consecutive stages whose ranks all fit, `partition`
finds the one whose busiest rank has least to do for a micro-batch, and among those the one with the evenest stages: the
least sum of their squares. Time and room of a rank are asked of the caller, so they can be of any kind: with layers
recomputed or offloaded, for one stage on a rank, two in a V, or two in a loop. It is exact for these, since the state
of the program is all that later ranks depend on: how many parts the ranks so far took from each row of stages.

    one stage     rank r takes the next parts                        state: parts taken
    V             rank r takes from both ends, inwards               state: parts taken from the front and the back
    loop of two   rank r takes the next of both halves               state: parts taken of each, for every halving

With more stages on a rank than two the program does the same for stages by themselves, and the ranks' room is
looked at afterwards: that is no longer exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from megatron_deepseek.parallel.schedule_rules import V_SHAPED

Bounds = tuple[int, int]  # a stage's parts [first, end)
_ROUNDING = 1 + 1e-9
_ABOVE = (1.0001, 1.05, 1.15, 1.4)  # times the bound that ranks may take: narrow programs first


@dataclass(frozen=True)
class Pipeline:
    """What is cut: a model's parts into `pp` x `virtual` stages, and how `schedule` places them.

    `seconds(rank, bounds)` is a rank's time for a micro-batch on the stages `bounds`, `fits(rank, bounds)` whether it
    has room for them. `part_seconds`: of each part a lower bound of what it adds to that time; `least`: of the busiest
    rank's time, which must not be above `most`. `usual`: which parts are the layers that most are, and `room`: how many
    of those each rank can hold, if that is known.
    """

    part_seconds: tuple[float, ...]
    pp: int
    virtual: int
    schedule: str
    seconds: Callable[[int, tuple[Bounds, ...]], float]
    fits: Callable[[int, tuple[Bounds, ...]], bool]
    least: float
    most: float = float("inf")
    usual: tuple[bool, ...] = ()
    room: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        """Return the number of parts."""
        return len(self.part_seconds)

    @cached_property
    def until(self) -> tuple[float, ...]:
        """Return for each number of parts the lower bound of their seconds together."""
        return (0.0, *accumulate(self.part_seconds))

    @cached_property
    def usual_until(self) -> tuple[int, ...]:
        """Return for each number of parts how many usual ones are among them."""
        return (0, *accumulate(self.usual or (0,) * self.parts))

    def room_behind(self, cap: float) -> tuple[float, ...]:
        """Return for each rank how many usual parts those behind it can hold and do within `cap`; the last entry is of
        all ranks.
        """
        if not self.room:
            return (float("inf"),) * (self.pp + 1)
        seconds = next(each for each, usual in zip(self.part_seconds, self.usual) if usual)
        each = [min(room, int(cap * _ROUNDING / seconds)) for room in self.room]
        return (*(sum(each[rank + 1:]) for rank in range(self.pp)), sum(each))


def partition(pipeline: Pipeline) -> tuple[Bounds, ...] | None:
    """Return the bounds of all stages in their order, None where no cut fits whose busiest rank is within `most` and
    1.4 times `least`: to compute all layers again costs a third.
    """
    solve = _one if pipeline.virtual == 1 else _stages_alone if pipeline.virtual > 2 else (
        _v_shape if pipeline.schedule in V_SHAPED else _loop)
    caps = sorted({min(pipeline.least * above, pipeline.most) for above in _ABOVE})
    for cap in caps:
        if pipeline.usual_until[-1] > pipeline.room_behind(cap)[-1]:
            continue
        found = solve(pipeline, cap)
        if found is not None:
            best, _ = found
            return solve(pipeline, best[0] * _ROUNDING, squares=True)[1]
    return None


Value = tuple[float, float]  # the busiest rank's seconds, or 0 and the sum of the stages' squares
Found = tuple[Value, tuple[Bounds, ...]]


def _value(pipeline: Pipeline, before: Value, seconds: float, squares: bool, each: tuple[Bounds, ...]) -> Value:
    """Return the value with one more rank; in a search for the evenest stages the maximum is bounded already."""
    uneven = sum((pipeline.until[end] - pipeline.until[first]) ** 2 for first, end in each)
    return (0.0, before[1] + uneven) if squares else (max(before[0], seconds), 0.0)


def _one(pipeline: Pipeline, cap: float, squares: bool = False) -> Found | None:
    """Return the best cut with one stage on a rank, of those whose ranks take at most `cap`."""
    table: dict[int, tuple[Value, tuple]] = {0: ((0.0, 0.0), ())}
    usual, room = pipeline.usual_until, pipeline.room_behind(cap)
    for rank in range(pipeline.pp):
        longer: dict[int, tuple[Value, tuple]] = {}
        left = pipeline.pp - 1 - rank
        for first, (value, chain) in table.items():
            for end in (range(first + 1, pipeline.parts - left + 1) if left else (pipeline.parts,)):
                if pipeline.until[end] - pipeline.until[first] > cap:
                    break
                if usual[-1] - usual[end] <= room[rank]:
                    _extend(pipeline, rank, cap, squares, longer, end, value, chain, ((first, end),))
        table = longer
    return _read(table.get(pipeline.parts))


def _v_shape(pipeline: Pipeline, cap: float, squares: bool = False) -> Found | None:
    """Return the best cut with stages r and 2 pp - 1 - r on rank r."""
    table: dict[Bounds, tuple[Value, tuple]] = {(0, pipeline.parts): ((0.0, 0.0), ())}
    until, usual, room = pipeline.until, pipeline.usual_until, pipeline.room_behind(cap)
    for rank in range(pipeline.pp):
        longer: dict[Bounds, tuple[Value, tuple]] = {}
        left = pipeline.pp - 1 - rank
        for (front, back), (value, chain) in table.items():
            for one in range(front + 1, back):
                if until[one] - until[front] > cap:
                    break
                for two in (range(back - 1, one + 2 * left - 1, -1) if left else (one,)):
                    least = until[one] - until[front] + until[back] - until[two]
                    if least > cap:
                        break
                    if until[two] - until[one] <= left * cap * _ROUNDING and usual[two] - usual[one] <= room[rank]:
                        each = (front, one), (two, back)
                        _extend(pipeline, rank, cap, squares, longer, (one, two), value, chain, each)
        table = longer
    ends = [found for (front, back), found in table.items() if front == back]
    return _read(min(ends, key=lambda each: each[0], default=None))


def _loop(pipeline: Pipeline, cap: float, squares: bool = False) -> Found | None:
    """Return the best cut with stages r and pp + r on rank r. Evener halves come first, and others are looked at only
    while they can be better.
    """
    until, pp = pipeline.until, pipeline.pp
    best: Found | None = None
    for half in sorted(range(pp, pipeline.parts - pp + 1), key=lambda each: abs(until[-1] - 2 * until[each])):
        one, two = until[half], until[-1] - until[half]
        if max(one, two) > pp * cap * _ROUNDING or (squares and best and (one * one + two * two) / pp >= best[0][1]):
            continue
        found = _halves(pipeline, cap if squares or best is None else best[0][0] / _ROUNDING, squares, half)
        best = found if best is None or (found is not None and found[0] < best[0]) else best
    return best


def _halves(pipeline: Pipeline, cap: float, squares: bool, half: int) -> Found | None:
    """Return the best cut whose second row of stages begins with part `half`."""
    until, parts, pp = pipeline.until, pipeline.parts, pipeline.pp
    usual, room = pipeline.usual_until, pipeline.room_behind(cap)
    table: dict[Bounds, tuple[Value, tuple]] = {(0, half): ((0.0, 0.0), ())}
    for rank in range(pp):
        longer: dict[Bounds, tuple[Value, tuple]] = {}
        left = pp - 1 - rank
        for (first, second), (value, chain) in table.items():
            for one in (range(first + 1, half - left + 1) if left else (half,)):
                if until[one] - until[first] > cap:
                    break
                for two in (range(second + 1, parts - left + 1) if left else (parts,)):
                    if until[one] - until[first] + until[two] - until[second] > cap:
                        break
                    usual_left = usual[half] - usual[one] + usual[parts] - usual[two]
                    if until[half] - until[one] + until[parts] - until[two] <= left * cap * _ROUNDING and \
                            usual_left <= room[rank]:
                        each = (first, one), (second, two)
                        _extend(pipeline, rank, cap, squares, longer, (one, two), value, chain, each)
        table = longer
    return _read(table.get((half, parts)))


def _stages_alone(pipeline: Pipeline, cap: float, squares: bool = False) -> Found | None:
    """Return a cut whose slowest stage is the fastest, if all its ranks fit and take at most `cap`."""
    pp, count = pipeline.pp, pipeline.pp * pipeline.virtual
    stages = Pipeline(pipeline.part_seconds, count, 1, pipeline.schedule,
                      lambda stage, bounds: pipeline.seconds(stage % pp, bounds), lambda stage, bounds: True,
                      pipeline.least / pipeline.virtual)
    found = partition(stages)
    if found is None:
        return None
    ranks = [tuple(found[rank::pp]) for rank in range(pp)]
    seconds = [pipeline.seconds(rank, each) for rank, each in enumerate(ranks)]
    if max(seconds) > cap or not all(pipeline.fits(rank, each) for rank, each in enumerate(ranks)):
        return None
    return (max(seconds), 0.0), found


def _extend(pipeline: Pipeline, rank: int, cap: float, squares: bool, table: dict, state, value: Value, chain: tuple,
            each: tuple[Bounds, ...]) -> None:
    """Enter into `table` that `rank` takes the stages `each`, if it can and no better way to `state` is known."""
    seconds = pipeline.seconds(rank, each)
    if seconds > cap:
        return
    after = _value(pipeline, value, seconds, squares, each)
    if (state not in table or after < table[state][0]) and pipeline.fits(rank, each):
        table[state] = after, (chain, each)


def _read(found: tuple[Value, tuple] | None) -> Found | None:
    """Return a chain of ranks as bounds in the order of the model."""
    if found is None:
        return None
    value, chain = found
    bounds: list[Bounds] = []
    while chain:
        chain, each = chain
        bounds += each
    return value, tuple(sorted(bounds))
