"""Distillation under layouts against one process: losses, every gradient, updated weights, in float64, to 1e-9.

The teacher is of another architecture, with experts and a vocabulary of more rows, and read from a directory.
"""

from pathlib import Path

import pytest
import torch
from compare import differences
from distillation_job import TEACHER, DistillationCase, run_alone, run_distillation
from small_checkpoints import random_weights, write_hf

CASES = (
    DistillationCase(pp=2, tp=2, sp=True, schedule="1F1B", microbatches=3, router="dense", attention="grouped",
                     teacher_ep=2, chunk=3, packed=True),
)
MORE = (
    DistillationCase(kd_loss="reverse-kl", cp=2, dp=2, ep=2, microbatches=2, mtp=1, teacher_ep=4),
    DistillationCase(kd_loss="jsd", pp=2, tp=2, schedule="DualPipeV", virtual=2, microbatches=4, ep=2, mtp=1,
                     placement="last"),
    DistillationCase(kd_loss="jsd", pp=2, dp=2, schedule="ZBVZeroBubble", virtual=2, microbatches=4, router="dense",
                     attention="grouped", tied=True, teacher_ep=2),
    DistillationCase(kd_loss="forward-kl", tp=2, cp=2, dp=2, etp=2, chunk=3, microbatches=1, micro_batch_size=2),
)
FURTHER = (
    DistillationCase(kd_loss="reverse-kl", tp=2, dp=2, sp=True, microbatches=2, lora="all+router+mtp", mtp=1,
                     reshard=True),
    DistillationCase(kd_loss="reverse-kl", pp=4, dp=2, schedule="Interleaved1F1B", virtual=2, microbatches=4,
                     recompute="full", packed=True, cut=0),
    DistillationCase(kd_loss="forward-kl", pp=2, cp=2, tp=2, schedule="1F1B", microbatches=2, cp_type="allgather",
                     teacher_ep=4),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    weights = random_weights(TEACHER, torch.float32)
    weights = {name: torch.ones_like(each) if "norm" in name else 0.5 * each for name, each in weights.items()}
    return write_hf(tmp_path_factory.mktemp("distillation") / "teacher", weights, TEACHER.to_hf_dict())


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE),
                                  *(pytest.param(case, marks=pytest.mark.long) for case in FURTHER)], ids=str)
def test_layout_learns_as_one_process(ranks, teacher, case):
    (alone,) = ranks.run(1, run_alone, case, teacher)
    found = differences(ranks.run(case.layout.world_size, run_distillation, case, teacher), alone)
    assert not found, "\n".join(found[:10])
    assert alone.steps[0].grad_norm > 0 and alone.steps[0].losses.reports["kd_loss"] > 0.1
