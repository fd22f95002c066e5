"""Compiled layers on ranks against one process without compilation, in float64, and how many graphs they make.

The backend is torch's aot_eager: the same graphs, forward and backward, whose operators torch runs as they are.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from base_job import BaseCase, run_base, run_base_alone
from cases import Case
from compare import differences
from compiled_job import Compiled, run_counted
from fp8_job import run_fp8, run_fp8_alone
from job import run_case, run_reference
from preference_data import pairs, rows_of, write_rows
from preference_job import PreferenceCase, run_alone, run_preference
from test_precision import losses
from torch_versions import keeps_bytes

from megatron_deepseek.model.build import Precision

STEPS = 4
BACKEND = "aot_eager"
compiled = partial(Case, compiler=BACKEND)

CASES = (
    compiled(tp=2, sp=True, ep=2, microbatches=3, mtp=1, shared=2, packed=True, chunk=3),
    compiled(dp=2, ep=2, dispatcher="grouped", router="group_limited", reshard=True, recompute="full"),
    compiled(pp=2, schedule="ZBVZeroBubble", virtual=2, microbatches=5, mtp=1, shared=2, recompute="layernorm"),
    compiled(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=5, shared=2, turns=True),
    compiled(cp=2, router="greedy", attention="no_q_lora", microbatches=3, recompute="moe_act"),
    compiled(cp=2, cp_type="allgather", microbatches=4, packed=True),
    compiled(pp=2, schedule="1F1B", tp=2, microbatches=3, attention="grouped", router="dense", tied=True),
    compiled(dp=2, ep=2, dispatcher="allgather", capacity="probs", mtp=1, lora="all+router+mtp", offload_layers=1),
    compiled(pp=2, schedule="InterleavedZeroBubble", virtual=2, cp=2, cp_type="allgather", microbatches=2, mtp=1,
             placement="own", shared=2, overlap=True, recompute="mla_up_proj"),
    compiled(pp=2, schedule="LoopedBFS", virtual=2, etp=2, dp=2, microbatches=2, micro_batch_size=2, mtp=2,
             placement="split", offload_optimizer=True),
    compiled(pp=2, schedule="GPipe", microbatches=2, capacity="position", moments="bf16"),
    compiled(pp=2, schedule="Interleaved1F1B", virtual=2, microbatches=2, forced=True, frozen=1),
)
FURTHER = CASES[8:]  # left to `make test-long`
SHOWN = [pytest.param(case, id=str(case), marks=() if case is CASES[0] else pytest.mark.long if case in FURTHER
                      else pytest.mark.slow) for case in CASES]
OVER_BFLOAT16 = compiled(dp=2, microbatches=2)


def assert_no_later_graphs(seen: list[Compiled], routed: bool) -> None:
    """While experts get other numbers of tokens, and rows other documents, no graph is made after two steps. Documents
    end anywhere, so that of some another context rank sends the keys of one token.
    """
    for each in seen:
        assert each.graphs[0] > 0 and each.graphs[2] == each.graphs[1], each.graphs
        assert not (routed and each.counts[1]) or each.counts[2] != each.counts[1]  # a stage may have no experts


@pytest.mark.parametrize("case", SHOWN)
def test_compiled_layers_compute_what_one_process_does(ranks, case):
    seen = ranks.run(case.layout.world_size, run_counted, run_case, case, STEPS)
    (reference,) = ranks.run(1, run_reference, case.reference, STEPS)
    assert not differences([each.record for each in seen], reference)
    assert_no_later_graphs(seen, case.router != "dense" and not case.forced)


@pytest.mark.slow
@keeps_bytes
def test_over_a_base_of_nf4(ranks):
    """QLoRA: adapters beside weights of four bits."""
    case = BaseCase(tp=2, sp=True, ep=2, shared=2, microbatches=2, compiler=BACKEND)
    seen = ranks.run(2, run_counted, run_base, case, STEPS)
    (alone,) = ranks.run(1, run_base_alone, replace(case, compiler=None), STEPS)
    assert not differences([each.record for each in seen], alone)
    assert_no_later_graphs(seen, routed=True)


@pytest.mark.slow
def test_preference(ranks, tmp_path):
    """DPO with adapters: a forward without them, of the reference, comes before each step."""
    file = write_rows(tmp_path / "pairs.jsonl", pairs(20))
    rows_of(file, "dpo")
    case = PreferenceCase(preference="dpo", dp=2, tp=2, microbatches=2, lora="all+router+mtp", mtp=1, compiler=BACKEND)
    seen = ranks.run(4, run_counted, run_preference, case, file, STEPS)
    (alone,) = ranks.run(1, run_alone, replace(case, compiler=None), file, STEPS)
    assert not differences([each.record for each in seen], alone)
    assert_no_later_graphs(seen, routed=True)


@pytest.mark.slow
def test_with_fp8_over_bfloat16(ranks):
    """The first losses as in bfloat16 alone; later ones with other tiles, and with experts chosen otherwise."""
    precision = Precision(torch.float32, torch.bfloat16, fp8=True)
    (alone,) = ranks.run(1, run_fp8_alone, 2, OVER_BFLOAT16.reference, 2, precision)
    for each in ranks.run(2, run_counted, run_fp8, 2, OVER_BFLOAT16, 2, replace(precision, fp8_gather=True)):
        assert each.graphs[0] > 0
        torch.testing.assert_close(losses(each.record)[0], losses(alone)[0], rtol=2e-2, atol=0)
        torch.testing.assert_close(losses(each.record), losses(alone), rtol=1e-1, atol=0)
