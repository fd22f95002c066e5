"""As many micro-batches as a dry run of memory makes are as many as a rank's peak needs, in every schedule."""

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import enough_micro_batches, with_micro_batches
from megatron_deepseek.parallel.schedule_rules import SCHEDULES
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import all_ranks

V3 = "--data-path x --train-iters 1 --model deepseek-v3 --bf16 --num-layers 16 --expert-model-parallel-size 2"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_micro_batches_add_nothing(schedule):
    arguments = f"{V3} --pipeline-model-parallel-size 4 --pipeline-schedule {schedule} --global-batch-size 64"
    whole = parse(arguments.split(), 8)
    number = enough_micro_batches(Job(whole), DryRun(True, False, 8))
    assert number == (32 if schedule in ("GPipe", "LoopedBFS") else 12 if schedule.startswith("Interleaved") else 9)
    cut = with_micro_batches(whole, number)
    assert [each.peak_bytes for each in all_ranks(Job(cut))] == [each.peak_bytes for each in all_ranks(Job(whole))]


def test_collectives_are_all_shown():
    whole = parse(f"{V3} --global-batch-size 64".split(), 8)
    assert enough_micro_batches(Job(whole), DryRun(True, True, 8)) == 8
