"""How many receives a pipeline rank has started whose micro-batch is not yet computed: each has a buffer of its own.

torch's schedules put a receive into a rank's list in the turn in which another rank's list has come to the send, which
is often some turns before the rank needs it. `_turns` goes through all lists in that manner
(torch.distributed.pipelining.schedules, `_add_send_recv`); tests compare the numbers with torch's own lists. Schedules
of one stage a rank start a receive when it is needed.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_deepseek.parallel.schedule_rules import VIRTUAL_STAGES, rank_of_stage
from megatron_deepseek.planning.actions import DUAL_PIPE, Act, Run, actions, held_stages

Waiting = Mapping[tuple[str, int], int]  # by kind, hidden states "F" or their gradients "B", and stage
Counts = tuple[tuple[tuple[int, int], ...], ...]  # of each act and stage: hidden states, gradients
_CLOSING = 2  # turns that a stage takes after its last backward: to reduce its gradients, to free gathered weights


@lru_cache(256)
def most_waiting(schedule: str, pp: int, virtual_stages: int, micro_batches: int) -> Waiting:
    """Return the most receives that wait for each stage at once, for its forwards ("F") and its backwards ("B")."""
    if schedule == DUAL_PIPE:  # each half of its ranks does what DualPipeV's do, but for the turn of the V
        both = most_waiting("DualPipeV", pp // 2, 2, micro_batches // 2) if pp > 2 else {}
        return {**one_each(pp), **both}
    if VIRTUAL_STAGES[schedule] == 1:
        return one_each(pp * virtual_stages)
    number = _enough(schedule, pp, micro_batches)
    waiting, most = Counter(), Counter()
    for event in _all_turns(schedule, pp, virtual_stages, number):
        if isinstance(event, Receive):
            waiting[event.kind, event.stage] += event.change
            most[event.kind, event.stage] = max(most[event.kind, event.stage], waiting[event.kind, event.stage])
    return most


@lru_cache(128)
def waiting_in_acts(schedule: str, pp: int, virtual_stages: int, micro_batches: int) -> tuple[Counts, ...]:
    """Return for each pipeline rank, each of its acts and each of its stages how many hidden states and how many
    gradients have arrived, or may at any time, while it does the act. A gradient counts to the end of its backward; a
    hidden state that is being computed is no longer counted.
    """
    held = [held_stages(schedule, pp, virtual_stages, rank) for rank in range(pp)]
    if schedule == DUAL_PIPE:
        most = most_waiting(schedule, pp, virtual_stages, micro_batches)
        every = [tuple((most.get(("F", stage), 0), most.get(("B", stage), 0)) for stage in each) for each in held]
        return tuple((each,) * len(actions(schedule, pp, virtual_stages, micro_batches, rank))
                     for rank, each in enumerate(every))
    if pp == 1 or VIRTUAL_STAGES[schedule] == 1:
        return tuple(tuple(_in_need(actions(schedule, pp, virtual_stages, micro_batches, rank), each, schedule,
                                    pp * virtual_stages))
                     for rank, each in enumerate(held))
    found, waiting = [[] for _ in held], Counter()
    for event in _all_turns(schedule, pp, virtual_stages, micro_batches):
        if isinstance(event, Receive):
            waiting[event.kind, event.stage] += event.change
        else:
            stages = held[event.rank]
            found[event.rank].append(tuple((waiting["F", stage], waiting["B", stage]) for stage in stages))
    return tuple(map(tuple, found))


def _in_need(acts: Sequence[Act], stages: Sequence[int], schedule: str, number: int
             ) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield for each act what has arrived where a receive is started when it is needed: the gradient of the backward
    that runs. Beside it torch's 1F1B holds the gradient that it sent last until it sends the next; it is as large as a
    hidden state that arrives, and is counted as one.
    """
    sent = 0
    for act in acts:
        backwards = {run.stage for run in act if run.kind in "BI"}
        yield tuple((sent if stage else 0, int(stage in backwards and stage < number - 1)) for stage in stages)
        sent = int(schedule == "1F1B" and bool(sent or backwards))


def one_each(stages: int) -> Waiting:
    """Return a buffer of each kind for every stage that receives."""
    return {("F", stage): 1 for stage in range(1, stages)} | {("B", stage): 1 for stage in range(stages - 1)}


def _enough(schedule: str, pp: int, micro_batches: int) -> int:
    """Return a number of micro-batches with which as many wait: once all ranks are busy, turns repeat themselves."""
    if schedule == "LoopedBFS" or micro_batches % pp:
        return micro_batches
    return min(micro_batches, 4 * pp)


def _all_turns(schedule: str, pp: int, virtual_stages: int, micro_batches: int) -> Iterator["Receive | Begin"]:
    lists = [actions(schedule, pp, virtual_stages, micro_batches, rank) for rank in range(pp)]
    stages = pp * virtual_stages
    return _turns(lists, lambda stage: rank_of_stage(stage, stages, pp, schedule), stages)


class Receive(NamedTuple):
    """`change` 1: a receive for a stage is started; -1: what it was for, a forward ("F") or backward ("B"), has it."""

    kind: str
    stage: int
    change: int


class Begin(NamedTuple):
    """A rank begins its next act."""

    rank: int


def _turns(lists: Sequence[Sequence[Act]], rank_of: Callable[[int], int], stages: int) -> Iterator[Receive | Begin]:
    """Yield what happens, in order. The hidden state that a forward takes is let go of before its act begins, the
    gradient of a backward behind it.

    In a turn each rank whose next act has all that it needs does it.
    """
    left = [deque(_with_closing_turns(acts)) for acts in lists]
    there: list[set[Run]] = [set() for _ in lists]  # what each rank has received or computed itself
    while any(left):
        moved = False
        for rank, acts in enumerate(left):
            if not acts or not all(_needs(run, stages) <= there[rank] for run in acts[0]):
                continue
            moved, act = True, acts.popleft()
            taken = [Receive(kind, run.stage, -1) for run in act for kind, before in _received(run)
                     if 0 <= run.stage + before < stages and rank_of(run.stage + before) != rank]
            yield from (each for each in taken if each.kind == "F")
            if act:
                yield Begin(rank)
            yield from (each for each in taken if each.kind == "B")
            for run in act:
                for kind, before in _received(run):
                    there[rank].add(Run(kind, run.stage, run.micro_batch))
                    receiver = run.stage - before
                    if 0 <= receiver < stages and rank_of(receiver) != rank:
                        there[rank_of(receiver)].add(Run(kind, run.stage, run.micro_batch))
                        yield Receive(kind, receiver, 1)
        assert moved, "ranks wait for each other for ever"


def _received(run: Run) -> tuple[tuple[str, int], ...]:
    """Return what a run receives, hidden states or gradients, and where from, as a step along the stages."""
    return () if run.kind == "W" else (("F", -1),) if run.kind == "F" else (("B", 1),)


def _with_closing_turns(acts: Sequence[Act]) -> Iterator[Act]:
    last = {run.stage: number for number, act in enumerate(acts) for run in act if run.kind in "BIW"}
    for number, act in enumerate(acts):
        yield act
        yield from [()] * _CLOSING * sum(number == each for each in last.values())


def _needs(run: Run, stages: int) -> set[Run]:
    """Return what must have arrived, or been computed on the same rank, before `run`."""
    if run.kind == "F":
        return {Run("F", run.stage - 1, run.micro_batch)} if run.stage else set()
    if run.kind == "W" or run.stage == stages - 1:
        return set()
    return {Run("B", run.stage + 1, run.micro_batch)}
