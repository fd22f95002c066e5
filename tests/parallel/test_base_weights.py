"""Adapters beside a base of NF4 or FP8 in layouts against one process, in float64: no bit of a weight may differ."""

import pytest
from base_job import BaseCase, run_base, run_base_alone
from compare import differences
from fp8_job import FP8, WIDE_LENGTH

CASES = (
    BaseCase(tp=2, dp=2, sp=True, ep=2, etp=2, shared=2, microbatches=2),
    BaseCase(dp=3, microbatches=2, reshard=True, bits=8),
    BaseCase(pp=2, schedule="ZBVZeroBubble", virtual=2, microbatches=2, shared=2, recompute="full",
             offload_optimizer=True),
    BaseCase(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=4, turns=True, bits=8,
             attention="no_q_lora"),
    BaseCase(tp=2, cp=2, etp=2, microbatches=2, bits=8, shared=2, recompute="layernorm,mla_up_proj,moe_act"),
    BaseCase(tp=2, router="greedy", ep=2, attention="one_key_head", microbatches=2, offload_layers=1),
)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case is CASES[0] else pytest.mark.slow)
                                  for case in CASES], ids=str)
def test_layout_computes_what_one_process_does(ranks, case):
    """Losses, every gradient of A and B, updated weights."""
    (alone,) = ranks.run(1, run_base_alone, case)
    assert not differences(ranks.run(case.layout.world_size, run_base, case), alone)


@pytest.mark.slow
def test_fp8_products_of_released_weights(ranks):
    """Tiles of a rank are those of one process, but for scales that sums in another order round the other way."""
    case, options = BaseCase(tp=2, sp=True, ep=2, shared=2, bits=8), (1, FP8, WIDE_LENGTH)
    (alone,) = ranks.run(1, run_base_alone, case, *options)
    assert not differences(ranks.run(2, run_base, case, *options), alone, 1e-7)
