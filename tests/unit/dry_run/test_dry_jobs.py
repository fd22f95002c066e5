"""Dry runs of tiny jobs: of layers that are made again, and of ranks that send to each other."""

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.labels import ACTIVATIONS
from megatron_deepseek.dry_run.rank import dry_rank
from megatron_deepseek.dry_run.timeline import Timeline

TINY = "--data-path x --train-iters 1 --model tiny --bf16 --seq-length 64 --num-layers 4 --mtp-num-layers 0"


def dry(arguments: str, ranks: int, rank: int = 0, micro_batches: int | None = None) -> Timeline:
    wanted = DryRun(True, False, ranks, micro_batches=micro_batches)
    return dry_rank(wanted, parse(f"{TINY} {arguments}".split(), ranks), rank).timeline


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "Interleaved1F1B"])
def test_what_was_sent_does_not_add_up(schedule):
    """Of four more micro-batches less is left than half the state that one sends, [1, 64, 128] in bfloat16."""
    few, many = (dry(f"--pipeline-model-parallel-size 2 --pipeline-schedule {schedule} --global-batch-size 8 "
                     "--num-virtual-stages-per-pipeline-rank 2", 2, 1, number).levels[-1] for number in (4, 8))
    assert few.act == many.act == "after the last act"
    assert many.categories[ACTIVATIONS] - few.categories[ACTIVATIONS] < 64 * 128 * 2 / 2


def test_layers_are_made_again_by_the_kernels_of_the_device():
    """A backward calls the same replaced functions as the forward; torch objects to tensors of other shapes."""
    kept, again = (dry(f"--global-batch-size 2 {more}", 1).peak for more in ("", "--recompute-granularity full"))
    assert again.bytes < kept.bytes
