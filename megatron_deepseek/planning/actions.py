"""Pipeline schedules as data: what each rank does, in its order, without torch.

A schedule is a few named steps, each with how often a rank repeats it and what it does every time. `actions` makes of
them the list of a rank; tests hold the lists against torch.distributed.pipelining's own, for every schedule and size,
and docs/architecture.md shows the steps. Memory (replay.py) and time follow from nothing but these lists.

`DualPipe` is the paper's bidirectional schedule (arXiv 2412.19437, section 3.2.1; github.com/deepseek-ai/DualPipe). No
run here has it, plans do: each rank holds two stages, one of each of two copies of the model, and half of the
micro-batches enter at either end. So rank r and rank p - 1 - r do what DualPipeV's rank r of p / 2 does, each with its
own micro-batches.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from megatron_deepseek.parallel.schedule_rules import INTERLEAVED, SCHEDULES, stages_of_rank

DUAL_PIPE = "DualPipe"
PLANNED_SCHEDULES = (*SCHEDULES, DUAL_PIPE)


@dataclass(frozen=True)
class Run:
    """A forward (F), a whole backward (B), or a backward's input gradients (I) or weight gradients (W), of one
    micro-batch on one stage.
    """

    kind: str
    stage: int
    micro_batch: int


Act = tuple[Run, ...]  # one run, or a forward and a backward that overlap


@dataclass(frozen=True)
class Place:
    """What the lengths of steps depend on: rank `r` of `p`, `v` stages on each, `m` micro-batches, of which a rank
    takes `q` through a stage before it turns to the next; `c` is how often the rank does its first step.
    """

    p: int
    r: int
    v: int
    m: int
    q: int
    c: int = 0


@dataclass(frozen=True)
class Step:
    """`count` says how often a rank does `actions`, one after the other.

    F, B, I and W are of the rank's first stage, f, b, i and w of its second; each takes that stage's next micro-batch,
    with an arrow from the last one down. "F+b" is a pair. "F/f" goes through all the rank's stages, `q` micro-batches
    of each in turn, "b/B" and "i/I" do so from the last stage; "W/w" is the weight gradients that have waited longest.
    """

    number: int
    name: str
    count: Callable[[Place], int]
    actions: tuple[str, ...]


def _steps(*rows: tuple[int, str, Callable[[Place], int], str]) -> tuple[Step, ...]:
    return tuple(Step(number, name, count, tuple(actions.split())) for number, name, count, actions in rows)


STEPS = {
    "GPipe": _steps(
        (1, "forwards", lambda x: x.m, "F"),
        (2, "backwards", lambda x: x.m, "B")),
    "1F1B": _steps(
        (1, "warm-up", lambda x: x.p - 1 - x.r, "F"),
        (2, "one forward, one backward", lambda x: x.m - x.c, "F B"),
        (3, "cool-down", lambda x: x.c, "B")),
    "LoopedBFS": _steps(
        (1, "forwards, stage by stage", lambda x: x.v * x.m, "F/f"),
        (2, "backwards, from the last stage", lambda x: x.v * x.m, "b↓/B↓")),
    "Interleaved1F1B": _steps(
        (1, "warm-up", lambda x: min((x.v - 1) * x.q + 2 * (x.p - 1 - x.r), x.v * x.m), "F/f"),
        (2, "one forward, one backward", lambda x: x.v * x.m - x.c, "F/f b/B"),
        (3, "cool-down", lambda x: x.c, "b/B")),
    "InterleavedZeroBubble": _steps(
        (1, "warm-up", lambda x: min((x.v - 1) * x.q + x.p - 1 - x.r, x.v * x.m), "F/f"),
        (2, "backwards whose W is kept", lambda x: x.r, "F/f i/I"),
        (3, "one forward, one backward", lambda x: x.v * x.m - x.c - x.r, "F/f i/I W/w"),
        (4, "cool-down", lambda x: x.c, "i/I W/w"),
        (5, "the W that were kept", lambda x: x.r, "W/w")),
    "ZBVZeroBubble": _steps(
        (1, "warm-up, first stage", lambda x: 2 * (x.p - x.r) - 1, "F"),
        (2, "warm-up, both stages", lambda x: x.r, "f F"),
        (3, "first backwards", lambda x: x.p - x.r, "f i w"),
        (4, "steady", lambda x: x.m - 2 * x.p + x.r + 1, "F I W f i w"),
        (5, "steady, no forwards left", lambda x: x.p - 1 - x.r, "I W f i w"),
        (6, "cool-down, both stages", lambda x: x.r, "I i"),
        (7, "cool-down, first stage", lambda x: x.p - x.r, "I W"),
        (8, "the second stage's last W", lambda x: x.r, "w"),
        (9, "the first stage's last W", lambda x: x.r, "W")),
    "DualPipeV": _steps(
        (1, "nF0", lambda x: 2 * (x.p - 1 - x.r), "F"),
        (2, "nF0F1", lambda x: x.r + 1, "F f"),
        (3, "nB1W1F1, zero bubble", lambda x: x.p - 1 - x.r, "i w f"),
        (4, "nF0B1F1B0, last rank's first", lambda x: int(x.r == x.p - 1), "F b f+B"),
        (4, "nF0B1F1B0, main step", lambda x: x.m - 2 * x.p + x.r + 1 - (x.r == x.p - 1), "F+b f+B"),
        (5, "nB1F1B0", lambda x: x.p - 1 - x.r, "b f+B"),
        (6, "nB1B0, first half", lambda x: x.r + 1, "b/B"),
        (6, "nB1B0, second half, zero bubble", lambda x: x.r + 1, "i/I"),
        (7, "nWB0", lambda x: x.p - 1 - x.r, "W/w I"),
        (8, "nW", lambda x: x.r + 1, "W/w"))}


def num_stages(schedule: str, pp: int, virtual_stages: int) -> int:
    """Return how many stages the model is cut in; DualPipe's two copies are cut in the same `pp`."""
    return pp if schedule == DUAL_PIPE else pp * virtual_stages


def held_stages(schedule: str, pp: int, virtual_stages: int, rank: int) -> list[int]:
    """Return the stages whose weights pipeline rank `rank` holds, in the order in which a micro-batch passes them."""
    if schedule == DUAL_PIPE:
        return sorted((rank, pp - 1 - rank))
    return stages_of_rank(rank, pp * virtual_stages, pp, schedule)


def actions(schedule: str, pp: int, virtual_stages: int, micro_batches: int, rank: int) -> list[Act]:
    """Return all that pipeline rank `rank` of `pp` does in a step of so many micro-batches of a data rank."""
    return [act for _, act in numbered_actions(schedule, pp, virtual_stages, micro_batches, rank)]


def numbered_actions(schedule: str, pp: int, virtual_stages: int, micro_batches: int, rank: int
                     ) -> list[tuple[int, Act]]:
    """Return (number of the step, act) for each of `actions`."""
    if pp == 1:
        return _without_pipeline(micro_batches)
    if schedule == DUAL_PIPE:
        return _dual_pipe(pp, micro_batches, rank)
    held = stages_of_rank(rank, pp * virtual_stages, pp, schedule)
    place = place_of(schedule, pp, virtual_stages, micro_batches, rank)
    return _Expansion(place, held).of(STEPS[schedule], micro_batches)


def place_of(schedule: str, pp: int, virtual_stages: int, micro_batches: int, rank: int) -> Place:
    """Return the Place of a rank. ZBVZeroBubble is made for 2 p - 1 micro-batches at least; those that there are not
    are left out of its list.
    """
    rounds = 1
    if schedule in INTERLEAVED:
        rounds = micro_batches // max(1, micro_batches // pp)
    elif schedule == "LoopedBFS":
        rounds = micro_batches
    most = max(micro_batches, 2 * pp - 1) if schedule == "ZBVZeroBubble" else micro_batches
    place = Place(pp, rank, virtual_stages, most, rounds)
    return Place(pp, rank, virtual_stages, most, rounds, c=STEPS[schedule][0].count(place))


class _Expansion:
    """Counts, while steps are written out, which micro-batch of each stage is next, and which weights wait."""

    def __init__(self, place: Place, held: list[int]):
        self._place, self._held = place, held
        self._done: Counter = Counter()
        self._turns: Counter = Counter()
        self._waiting: deque[tuple[int, int]] = deque()

    def of(self, steps: tuple[Step, ...], micro_batches: int) -> list[tuple[int, Act]]:
        made = []
        for step in steps:
            tokens = [action.split("+") for action in step.actions]
            for _ in range(step.count(self._place)):
                made += [(step.number, tuple(map(self._run, pair))) for pair in tokens]
        return [(number, act) for number, act in made if act[0].micro_batch < micro_batches]

    def _run(self, token: str) -> Run:
        kind = token[0].upper()
        if token == "W/w":
            return Run("W", *self._waiting.popleft())
        stage = self._in_turn(kind == "F") if "/" in token else self._held[token[0].islower()]
        counted = stage, "B" if kind == "I" else kind
        number = self._done[counted]
        self._done[counted] += 1
        micro_batch = self._place.m - 1 - number if token.endswith("↓") else number
        if kind == "I":
            self._waiting.append((stage, micro_batch))
        elif kind == "W":
            self._waiting.remove((stage, micro_batch))
        return Run(kind, stage, micro_batch)

    def _in_turn(self, forward: bool) -> int:
        turn = self._turns[forward] // self._place.q % len(self._held)
        self._turns[forward] += 1
        return self._held[turn if forward else -1 - turn]


def _without_pipeline(micro_batches: int) -> list[tuple[int, Act]]:
    """Return a forward and a backward of each micro-batch in turn (parallel/pipeline.py: `Pipeline.train`)."""
    return [(1, (Run(kind, 0, number),)) for number in range(micro_batches) for kind in "FB"]


def _dual_pipe(pp: int, micro_batches: int, rank: int) -> list[tuple[int, Act]]:
    """Return what DualPipeV's rank of half as many ranks and micro-batches does. The first stage of a rank of the first
    half takes the micro-batches that enter at rank 0, its second those that enter at the other end.
    """
    assert pp % 2 == 0 and micro_batches % 2 == 0, (pp, micro_batches)
    near, half = min(rank, pp - 1 - rank), micro_batches // 2
    own_end = rank >= pp // 2
    made = numbered_actions("DualPipeV", pp // 2, 2, half, near) if pp > 2 else _Expansion(
        place_of("DualPipeV", 1, 2, half, 0), [0, 1]).of(STEPS["DualPipeV"], half)

    def there(run: Run) -> Run:
        enters_far = own_end if run.stage == near else not own_end
        return Run(run.kind, run.stage, run.micro_batch + half * enters_far)

    return [(number, tuple(map(there, act))) for number, act in made]
