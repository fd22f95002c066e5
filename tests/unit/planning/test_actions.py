"""Schedules as data, against torch.distributed.pipelining's own lists and what the DualPipe paper says of its own."""

from collections import Counter

import pytest
from schedule_pictures import torch_acts

from megatron_deepseek.parallel.schedule_rules import SCHEDULES, takes_microbatches, takes_virtual_stages
from megatron_deepseek.planning.actions import actions, held_stages
from megatron_deepseek.planning.simulation import simulate

UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_lists_are_torchs(schedule):
    """Every action of every rank, in its order, for each number of stages on a rank that the schedule takes."""
    tried = 0
    for pp in (2, 3, 4, 8):
        for virtual_stages in (each for each in range(1, 5) if takes_virtual_stages(schedule, each)):
            numbers = (*range(1, 10), 12, 16, 17)
            for micro_batches in (each for each in numbers if takes_microbatches(schedule, pp, each)):
                for rank, acts in enumerate(torch_acts(schedule, pp, micro_batches, virtual_stages)):
                    made = actions(schedule, pp, virtual_stages, micro_batches, rank)
                    assert made == acts, (pp, virtual_stages, micro_batches, rank)
                    tried += 1
    assert tried > 30


@pytest.mark.parametrize("pp, micro_batches", [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_dual_pipe_runs_every_micro_batch_once_on_every_stage(pp, micro_batches):
    acts = [actions("DualPipe", pp, 1, micro_batches, rank) for rank in range(pp)]
    done = Counter(run for own in acts for act in own for run in act)
    assert max(done.values()) == 1
    forwards = {(run.stage, run.micro_batch) for run in done if run.kind == "F"}
    assert forwards == {(stage, number) for stage in range(pp) for number in range(micro_batches)}
    whole, inputs, weights = ({(run.stage, run.micro_batch) for run in done if run.kind == kind} for kind in "BIW")
    assert inputs == weights and not whole & inputs and whole | inputs == forwards
    for rank, own in enumerate(acts):
        assert {run.stage for act in own for run in act} == set(held_stages("DualPipe", pp, 1, rank))


@pytest.mark.parametrize("pp, micro_batches", [(4, 8), (8, 16), (8, 40), (16, 120)])
def test_dual_pipes_bubble_is_the_papers(pp, micro_batches):
    """(p / 2 - 1)(F&B + B - 3 W) where a pair takes F&B (README of deepseek-ai/DualPipe). The ends of the pipeline idle
    as long as that; F = 1, B = 2, W = 1, F&B = 3 give 2 (p / 2 - 1).
    """
    acts = [actions("DualPipe", pp, 1, micro_batches, rank) for rank in range(pp)]
    spans = simulate(acts, lambda _, act: sum(UNITS[run.kind] for run in act), pp - 1)
    end = max(own[-1].end for own in spans)
    work = 3 * micro_batches
    assert [end - work] == [2 * (pp // 2 - 1)]


def test_ranks_that_wait_for_each_other_are_found():
    acts = [actions("1F1B", 2, 1, 4, 0), actions("1F1B", 2, 1, 4, 1)[::-1]]
    with pytest.raises(AssertionError, match="for ever"):
        simulate(acts, lambda *_: 1.0, 1)
