"""The precisions that training runs in: float32, and bfloat16 layers over float32 master weights and gradients."""

from dataclasses import replace

import pytest
import torch
from cases import WIDE_CASES, Case, cost, covering_cases
from command_lines import cover_features
from compare import differences
from job import Record, run_case, run_reference

from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel import schedule_rules

pytestmark = pytest.mark.slow

FLOAT32 = Precision(torch.float32)
BFLOAT16 = Precision(torch.float32, torch.bfloat16)

CASES = (  # in float32
    Case(dp=2, tp=2, sp=True, ep=4, microbatches=2, mtp=1, shared=2),
    Case(tp=2, router="group_limited", microbatches=4, recompute="full", attention_bias=True),
    Case(pp=2, schedule="DualPipeV", virtual=2, dp=2, ep=2, microbatches=4, mtp=2, placement="split", tied=True),
    Case(pp=4, schedule="1F1B", microbatches=4, router="greedy", mtp=1, placement="own", recompute="moe_act"),
)


def losses(record: Record) -> torch.Tensor:
    """Every loss of every step, and the evaluation's."""
    steps = [*(step.losses for step in record.steps), record.evaluation]
    return torch.tensor([[each.lm_loss, *each.mtp_loss, each.balance_loss] for each in steps])


# Of the array in float64, cases enough that every feature runs in bfloat16 too; of pre-training, for what other
# objectives report are differences, or counts of pairs, which no tolerance of a part of them fits.
BFLOAT16_CASES = cover_features((replace(case, objective="next_token") for case in (*covering_cases(), *WIDE_CASES)),
                                lambda case: cost(vars(case)))


def check_losses(ranks, case: Case, precision: Precision, tolerance: float) -> None:
    """Of two steps, and of an evaluation after them."""
    (reference,) = ranks.run(1, run_reference, case.reference, 2, precision)
    for record in ranks.run(case.layout.world_size, run_case, case, 2, precision):
        torch.testing.assert_close(losses(record), losses(reference), rtol=tolerance, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_in_float32(ranks, case):
    """float32 rounds at 6e-8, and layouts add in another order: 1e-7 to 1e-6 was seen."""
    check_losses(ranks, case, FLOAT32, 1e-5)


@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=str)
def test_losses_in_bfloat16(ranks, case):
    """bfloat16 rounds activations at 4e-3, differently where TP sums parts that are already rounded, and where context
    parallelism joins parts: up to 5e-3 was seen.
    """
    check_losses(ranks, case, BFLOAT16, 2e-2)


@pytest.mark.parametrize("schedule", schedule_rules.SCHEDULES)
def test_bfloat16_gradients_accumulate_in_float32(ranks, schedule):
    """A pipeline alone rounds nothing differently: each micro-batch's gradients are one process's bit for bit, and
    their float32 sum differs by its order at most. Added up in bfloat16, 8 of them would be off by 1e-3 and more.
    """
    case = Case(pp=2, schedule=schedule, virtual=schedule_rules.VIRTUAL_STAGES[schedule], microbatches=8)
    reference = replace(case.reference, micro_batch_size=case.micro_batch_size)
    (expected,) = ranks.run(1, run_reference, reference, 1, BFLOAT16)
    assert not differences(ranks.run(2, run_case, case, 1, BFLOAT16), expected, tolerance=1e-5)
