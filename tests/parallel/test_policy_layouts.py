"""GRPO under layouts against one process: losses, reports, every gradient, updated weights, to 1e-9 in float64.

Samples are packed over the data ranks' rows; some rows are blank, one group is even, and one reward is unknown.
"""

import pytest
from compare import differences
from policy_job import PolicyCase, run_alone, run_policy

CASES = (
    PolicyCase(policy="v3.2", kept=True, pp=2, tp=2, sp=True, ep=2, schedule="1F1B", mtp=1),
    PolicyCase(policy="gspo", dp=2, cp=2, ep=4, dispatcher="allgather", cp_type="allgather", chunk=3),
)
MORE = (
    PolicyCase(policy="defaults", dp=2, tp=2, lora="all+router+mtp", mtp=1),
    PolicyCase(policy="dapo", pp=2, tp=2, cp=2, sp=True, ep=2, schedule="1F1B", mtp=1, recompute="full"),
    PolicyCase(policy="cispo", pp=2, tp=2, dp=2, sp=True, schedule="ZBVZeroBubble", virtual=2),
)
FURTHER = (
    PolicyCase(policy="cispo", tp=2, cp=2, chunk=3, kept=True, micro_batch_size=2),
    PolicyCase(policy="v3.2", dp=2, pp=2, schedule="Interleaved1F1B", virtual=2, reshard=True, chunk=5),
    PolicyCase(policy="gspo", pp=4, schedule="DualPipeV", virtual=2, recompute="moe_act", tied=True),
    PolicyCase(policy="dapo", dp=3, kept=True, micro_batch_size=2),
    PolicyCase(policy="gspo", cp=4, tp=2, chunk=3),
)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE),
                                  *(pytest.param(case, marks=pytest.mark.long) for case in FURTHER)], ids=str)
def test_layout_trains_as_one_process(ranks, case):
    (alone,) = ranks.run(1, run_alone, case)
    found = differences(ranks.run(case.layout.world_size, run_policy, case), alone)
    assert not found, "\n".join(found[:10])
    assert alone.steps[0].grad_norm > 0
