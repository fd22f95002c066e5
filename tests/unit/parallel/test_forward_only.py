"""The order of forwards without backwards: each after what it needs, in few turns, few that wait."""

import pytest

from megatron_deepseek.parallel.forward_only import forward_order
from megatron_deepseek.parallel.schedule_rules import SCHEDULES, VIRTUAL_STAGES, rank_of_stage

PLACEMENTS = [(schedule, pp, VIRTUAL_STAGES[schedule]) for schedule in SCHEDULES for pp in (2, 3, 8)]


def ranks_of(schedule: str, pp: int, virtual: int) -> list[int]:
    return [rank_of_stage(stage, pp * virtual, pp, schedule) for stage in range(pp * virtual)]


def played(order: dict[int, list[tuple[int, int]]], stages: int) -> tuple[int, int]:
    """Play the ranks' lists, a forward a turn, as soon as its input was made in an earlier turn.

    Return the number of turns, and the most micro-batches that were made for a stage and not yet taken by it.
    """
    left, done = {rank: list(forwards) for rank, forwards in order.items()}, [set() for _ in range(stages)]
    turns = most = 0
    while any(left.values()):
        before = [set(each) for each in done]
        for forwards in left.values():
            if forwards and (forwards[0][0] == 0 or forwards[0][1] in before[forwards[0][0] - 1]):
                stage, micro_batch = forwards.pop(0)
                done[stage].add(micro_batch)
        assert done != before, "nobody can go on"
        turns += 1
        most = max(most, *(len(done[stage - 1] - done[stage]) for stage in range(1, stages)))
    return turns, most


@pytest.mark.parametrize("schedule, pp, virtual", [*PLACEMENTS, ("Interleaved1F1B", 4, 3)])
@pytest.mark.parametrize("number", [1, 5, 40])
def test_every_forward_comes_once_on_its_rank(schedule, pp, virtual, number):
    ranks = ranks_of(schedule, pp, virtual)
    order = forward_order(ranks, number)
    for rank in range(pp):
        assert sorted(order[rank]) == [(stage, each) for stage in range(pp * virtual) if ranks[stage] == rank
                                       for each in range(number)]
    stage_by_stage = {rank: sorted(forwards) for rank, forwards in order.items()}
    more = played(order, len(ranks))[0] - played(stage_by_stage, len(ranks))[0]
    assert more < len(ranks) if number % pp else more <= 0


@pytest.mark.parametrize("schedule, pp, virtual", PLACEMENTS)
def test_few_hidden_states_wait(schedule, pp, virtual):
    """Two, and one more that a stage has just made."""
    ranks = ranks_of(schedule, pp, virtual)
    assert played(forward_order(ranks, 100), len(ranks))[1] <= 3
