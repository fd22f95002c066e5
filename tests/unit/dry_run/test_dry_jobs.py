"""Dry runs of tiny jobs: of layers that are made again, of ranks that send to each other, and of shards on the host."""

from contextlib import nullcontext

import pytest
import torch

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.labels import ACTIVATIONS, HOST, WEIGHTS
from megatron_deepseek.dry_run.loads import drawn
from megatron_deepseek.dry_run.rank import dry_rank, run_rank
from megatron_deepseek.dry_run.routing import BALANCED
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import Timeline
from megatron_deepseek.settings import Settings

TINY = "--data-path x --train-iters 1 --model tiny --bf16 --seq-length 64 --num-layers 4 --mtp-num-layers 0"


def settings_of(arguments: str, ranks: int) -> Settings:
    return parse(f"{TINY} {arguments}".split(), ranks)


def dry(arguments: str, ranks: int, rank: int = 0, micro_batches: int | None = None) -> Timeline:
    wanted = DryRun(True, False, ranks, micro_batches=micro_batches)
    return dry_rank(wanted, settings_of(arguments, ranks), rank).timeline


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


def test_shards_that_are_padded_are_weights_too():
    """The last of three ranks has one row less of the embedding, and FSDP makes its shard anew in the first forward."""
    levels = dry("--global-batch-size 3 --num-layers 1", 3, 2).levels
    assert levels[0].categories[WEIGHTS] == levels[-1].categories[WEIGHTS]


def test_shards_on_the_host_pass_through_a_gpu():
    """Of shards that are copied those of the embedding and the head are alone in their size, 8192 x 128 over two ranks.
    """
    settings, log = settings_of("--global-batch-size 2 --num-layers 2 --optimizer-cpu-offload", 2), StorageLog()
    run_rank(settings, 0, drawn(settings, BALANCED), log, nullcontext(), gpu=True)
    copies = [each for each in log.allocations if each.shape == (8192 * 128 // 2,) and each.dtype == torch.float32]
    assert [each.label for each in copies] == [None, None]  # the device's, for a moment
    gradients = [each for each in log.allocations if each.of == "gradient of lm_head.weight" and each.label == HOST]
    assert [each.shape for each in gradients] == [(4096, 128)]  # not the device's, of which it was a part
