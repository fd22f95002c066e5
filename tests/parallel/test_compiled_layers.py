"""Compiled layers on ranks against one process without compilation, in float64, and how many graphs they make.

The backend is torch's aot_eager: the same graphs, forward and backward, whose operators torch runs as they are.
"""

import pytest
from cases import Case
from compare import differences
from compiled_job import run_compiled
from job import run_reference

STEPS = 4

CASES = (
    Case(tp=2, sp=True, ep=2, microbatches=3, mtp=1, shared=2, packed=True, chunk=3),
    Case(dp=2, ep=2, dispatcher="grouped", router="group_limited", reshard=True, recompute="full"),
    Case(pp=2, schedule="ZBVZeroBubble", virtual=2, microbatches=5, mtp=1, shared=2, recompute="layernorm"),
    Case(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=5, shared=2, turns=True),
    Case(cp=2, router="greedy", attention="no_q_lora", microbatches=3, recompute="moe_act"),
    Case(pp=2, schedule="1F1B", tp=2, microbatches=3, attention="grouped", router="dense", tied=True),
    Case(dp=2, ep=2, dispatcher="allgather", capacity="probs", mtp=1, lora="all+router+mtp", offload_layers=1),
)
SHOWN = [pytest.param(case, id=str(case), marks=() if case is CASES[0] else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", SHOWN)
def test_compiled_layers_compute_what_one_process_does(ranks, case):
    """And while experts get other numbers of tokens, and rows other documents, no graph is made after two steps."""
    seen = ranks.run(case.layout.world_size, run_compiled, case, "aot_eager", STEPS)
    (reference,) = ranks.run(1, run_reference, case.reference, STEPS)
    assert not differences([each.record for each in seen], reference)
    for each in seen:
        assert each.graphs[0] > 0 and each.graphs[2] == each.graphs[1], each.graphs
        assert each.counts[2] != each.counts[1] or case.router == "dense"
