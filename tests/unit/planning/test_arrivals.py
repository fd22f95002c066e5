"""Receives that wait, against the lists of torch.distributed.pipelining with its own sends and receives in them."""

from collections import Counter

import pytest
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_reduce_grad,
    _add_send_recv,
    _add_unshard_reshard,
    _ComputationType,
)

from megatron_deepseek.parallel.schedule_rules import SCHEDULES, VIRTUAL_STAGES, rank_of_stage, takes_microbatches
from megatron_deepseek.planning.actions import Act, actions
from megatron_deepseek.planning.arrivals import most_waiting

KINDS = {"F": _ComputationType.FORWARD, "B": _ComputationType.FULL_BACKWARD, "I": _ComputationType.BACKWARD_INPUT,
         "W": _ComputationType.BACKWARD_WEIGHT}
STARTED = {_ComputationType.RECV_F: "F", _ComputationType.RECV_B: "B"}
COMPUTED = {_ComputationType.FORWARD: "F", _ComputationType.FULL_BACKWARD: "B", _ComputationType.BACKWARD_INPUT: "B"}
LOOPS = [name for name in SCHEDULES if VIRTUAL_STAGES[name] > 1]


def torch_action(act: Act) -> _Action:
    parts = tuple(_Action(run.stage, KINDS[run.kind], run.micro_batch) for run in act)
    return parts[0] if len(parts) == 1 else _Action(-1, _ComputationType.OVERLAP_F_B, None, parts)


def torchs_most(schedule: str, pp: int, virtual: int, micro_batches: int) -> dict:
    lists = {rank: list(map(torch_action, actions(schedule, pp, virtual, micro_batches, rank))) for rank in range(pp)}
    lists = {rank: _add_reduce_grad(_add_unshard_reshard(acts), micro_batches) for rank, acts in lists.items()}
    whole = _add_send_recv(lists, lambda stage: rank_of_stage(stage, pp * virtual, pp, schedule), pp * virtual)
    most = Counter()
    for acts in whole.values():
        waiting = Counter()
        for act in acts:
            if act.computation_type in STARTED:
                key = STARTED[act.computation_type], act.stage_index
                waiting[key] += 1
                most[key] = max(most[key], waiting[key])
            for part in act.sub_actions or (act,):
                key = COMPUTED.get(part.computation_type), part.stage_index
                waiting[key] -= key in waiting
    return dict(most)


@pytest.mark.parametrize("schedule", LOOPS)
def test_as_many_receives_wait_as_in_torchs_lists(schedule):
    tried = 0
    for pp in (2, 3, 4, 8):
        for virtual in (2,) if schedule in ("ZBVZeroBubble", "DualPipeV") else (2, 3):
            for micro_batches in (pp, 2 * pp, 3 * pp + 1, 6 * pp):
                if takes_microbatches(schedule, pp, micro_batches):
                    expected = torchs_most(schedule, pp, virtual, micro_batches)
                    assert dict(most_waiting(schedule, pp, virtual, micro_batches)) == expected, (pp, virtual,
                                                                                                  micro_batches)
                    tried += 1
    assert tried > 5


def test_what_waits_does_not_grow_with_the_batch():
    """Two hidden states and two gradients at most, whatever the batch."""
    few, many = (most_waiting("DualPipeV", 16, 2, number) for number in (64, 1920))
    assert few == many and max(many.values()) == 2
