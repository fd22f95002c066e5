"""Kept routing under layouts against one process, in float64, to 1e-9: losses, counts, every gradient, updated weights.

Experts are drawn, for some of the tokens of each layer; the others are left to the routers. What one process computes
is held against a plain model by tests/unit/model/test_kept_routing.py.
"""

import pytest
import torch
from cases import Case
from compare import differences
from job import SEQ_LENGTH, experts_to_replay, run_case, run_reference

from megatron_deepseek.parallel import schedule_rules
from megatron_deepseek.training.replay import stack_experts

STEPS = 2
CASES = (
    Case(pp=2, schedule="1F1B", tp=2, sp=True, ep=2, microbatches=2, mtp=1, padded=True, recompute="full", replay=True),
    Case(tp=2, cp=2, ep=4, dispatcher="grouped", node=2, microbatches=2, packed=True, replay=True),
)
FURTHER = tuple(
    Case(pp=2, schedule=schedule, virtual=2 if schedule_rules.takes_virtual_stages(schedule, 2) else 1, microbatches=4,
         mtp=1, placement="last", recompute="moe_act", replay=True) for schedule in schedule_rules.SCHEDULES)
MORE = (
    Case(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=4, mtp=1, turns=True, shared=2, replay=True),
    Case(cp=4, tp=2, sp=True, ep=4, dispatcher="allgather", cp_type="allgather", mtp=2, padded=True, replay=True),
    Case(dp=2, etp=2, dispatcher="allgather", router="group_limited", shared=2, overlap=True, replay=True),
    Case(dp=2, tp=2, ep=2, capacity="position", microbatches=2, mtp=1, replay=True),
    Case(pp=2, schedule="InterleavedZeroBubble", virtual=2, cp=2, ep=2, router="greedy", microbatches=4, reshard=True,
         lora="all+router+mtp", mtp=1, replay=True),
    Case(dp=2, cp=2, offload_layers=1, recompute="full", objective="samples", packed=True, microbatches=2, replay=True),
)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE),
                                  *(pytest.param(case, marks=pytest.mark.long) for case in FURTHER)], ids=str)
def test_layout_replays_as_one_process(ranks, case):
    (alone,) = ranks.run(1, run_reference, case.reference, STEPS)
    records = ranks.run(case.layout.world_size, run_case, case, STEPS)
    found = differences(records, alone)
    assert not found, "\n".join(found[:10])
    given = experts_to_replay(case.model, case.global_batch_size, STEPS)[records[0].rows]
    kept = stack_experts(records[0].scores.experts, case.model)
    was_given = (given >= 0) & (kept >= 0)  # no expert gets padding
    assert given.shape[1] == SEQ_LENGTH and was_given.any() and torch.equal(kept[was_given], given[was_given])
