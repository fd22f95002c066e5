"""How many receives a pipeline rank has started whose micro-batch is not yet computed: each has a buffer of its own.

torch's schedules put a receive into a rank's list in the turn in which another rank's list has come to the send, which
is often some turns before the rank needs it. `_turns` goes through all lists in that manner
(torch.distributed.pipelining.schedules, `_add_send_recv`); tests compare the numbers with torch's own lists. Schedules
of one stage a rank start a receive when it is needed.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

from megatron_deepseek.parallel.schedule_rules import VIRTUAL_STAGES, rank_of_stage
from megatron_deepseek.planning.actions import DUAL_PIPE, Act, Run, actions

Waiting = Mapping[tuple[str, int], int]  # by kind, hidden states "F" or their gradients "B", and stage
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
    lists = [actions(schedule, pp, virtual_stages, number, rank) for rank in range(pp)]
    stages = pp * virtual_stages
    waiting, most = Counter(), Counter()
    for kind, stage, change in _turns(lists, lambda stage: rank_of_stage(stage, stages, pp, schedule), stages):
        waiting[kind, stage] += change
        most[kind, stage] = max(most[kind, stage], waiting[kind, stage])
    return most


def one_each(stages: int) -> Waiting:
    """Return a buffer of each kind for every stage that receives."""
    return {("F", stage): 1 for stage in range(1, stages)} | {("B", stage): 1 for stage in range(stages - 1)}


def _enough(schedule: str, pp: int, micro_batches: int) -> int:
    """Return a number of micro-batches with which as many wait: once all ranks are busy, turns repeat themselves."""
    if schedule == "LoopedBFS" or micro_batches % pp:
        return micro_batches
    return min(micro_batches, 4 * pp)


def _turns(lists: Sequence[Sequence[Act]], rank_of: Callable[[int], int], stages: int
           ) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, stage, +1) for each receive that is started and (kind, stage, -1) when its micro-batch is computed.

    In a turn each rank whose next act has all that it needs does it.
    """
    left = [deque(_with_closing_turns(acts)) for acts in lists]
    there: list[set[Run]] = [set() for _ in lists]  # what each rank has received or computed itself
    while any(left):
        moved = False
        for rank, acts in enumerate(left):
            if not acts or not all(_needs(run, stages) <= there[rank] for run in acts[0]):
                continue
            moved = True
            for run in acts.popleft():
                if run.kind == "W":
                    continue
                kind = "F" if run.kind == "F" else "B"
                there[rank].add(Run(kind, run.stage, run.micro_batch))
                before, after = (-1, 1) if kind == "F" else (1, -1)
                if 0 <= run.stage + before < stages and rank_of(run.stage + before) != rank:
                    yield kind, run.stage, -1
                if 0 <= run.stage + after < stages and rank_of(run.stage + after) != rank:
                    there[rank_of(run.stage + after)].add(Run(kind, run.stage, run.micro_batch))
                    yield kind, run.stage + after, 1
        assert moved, "ranks wait for each other for ever"


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
