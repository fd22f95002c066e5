"""What an evaluation through a pipeline keeps: hidden states of a few micro-batches, however many there are.

Its bytes are seen by a dry run's log: of one rank, whose tensors have no numbers.
"""

from functools import partial

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.dry_run.fake_tensors import nothing_computed
from megatron_deepseek.dry_run.labels import ACTIVATIONS, TEMPORARIES, LabellingWatch, label_states
from megatron_deepseek.dry_run.loads import drawn
from megatron_deepseek.dry_run.rank import batch_of, empty_stages
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import BEFORE, bytes_over_time
from megatron_deepseek.parallel.fake_job import fake_job
from megatron_deepseek.runtime.job import training_spec
from megatron_deepseek.training.trainer import Trainer

TINY = "--data-path x --train-iters 1 --model tiny --bf16 --seq-length 64 --num-layers 4 --mtp-num-layers 0"
STATE = 1, 64, 128  # the hidden states of a micro-batch, in bfloat16
STATE_BYTES = 64 * 128 * 2


def evaluation(schedule: str, rank: int, micro_batches: int) -> tuple[int, int]:
    """Evaluate on one of two pipeline ranks. Return the most bytes that come and go in its acts, and how many hidden
    states are left behind them.
    """
    stages = "" if schedule == "1F1B" else "--num-virtual-stages-per-pipeline-rank 2"
    settings = parse(f"{TINY} --pipeline-model-parallel-size 2 --pipeline-schedule {schedule} {stages} "
                     f"--global-batch-size {micro_batches}".split(), 2)
    log = StorageLog()
    with fake_job(settings.layout, rank) as meshes, nothing_computed(gpu=False), log.watching():
        watch = LabellingWatch(log)
        make = partial(empty_stages, drawn(settings, "uniform"))
        trainer = watch.trainer = Trainer(training_spec(settings), meshes, None, make, watch)
        batch = batch_of(settings)
        label_states(log, trainer, batch)
        trainer.evaluate(batch)
        left = sum(each.shape == STATE for each in log.allocations if each.size)
    return max(each.categories[ACTIVATIONS] + each.categories[TEMPORARIES]
               for each in bytes_over_time(log).levels if each.act != BEFORE), left


@pytest.mark.parametrize("schedule, rank", [("1F1B", 0), ("Interleaved1F1B", 1), ("ZBVZeroBubble", 1)])
def test_hidden_states_do_not_add_up(schedule, rank):
    (few, left_of_few), (many, left_of_many) = (evaluation(schedule, rank, number) for number in (4, 8))
    assert many - few < STATE_BYTES
    assert left_of_few == left_of_many == 0
