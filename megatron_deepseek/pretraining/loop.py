"""Pre-training: indexed datasets and their blends, and the next token of every position."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.data.blend import SPLITS
from megatron_deepseek.data.mock import with_mock_data
from megatron_deepseek.data.pretraining import check_data, open_datasets, shared_plan
from megatron_deepseek.data.table import describe_split
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.evaluation.while_training import TrainingTasks
from megatron_deepseek.pretraining.validation import validate, validation_sets
from megatron_deepseek.runtime.job import run_job
from megatron_deepseek.runtime.resume import num_samples
from megatron_deepseek.runtime.task import Prepared, RunData, Task
from megatron_deepseek.settings import Settings


def pretrain(settings: Settings) -> None:
    """Run the job of `settings` on this rank. A user's mistake in data or checkpoint ends it with status 2."""
    run_job(Pretraining(), settings)


class Pretraining(Task):
    """The task of pre-training."""

    def __init__(self):
        self._tasks = TrainingTasks()

    def check(self, settings: Settings) -> Settings:
        self._tasks.load(settings)
        settings = replace(settings, data=with_mock_data(settings.data))
        check_data(settings.data, settings.model.vocab_size, num_samples(settings))
        return settings

    def prepare(self, settings: Settings) -> Prepared:
        """Return the task as it is: indices are built when it is known how many samples are left."""
        return Prepared(replace(settings, data=with_mock_data(settings.data)), self._open_data)

    def _open_data(self, settings: Settings, state: TrainState, say: Callable[[str], None]) -> RunData:
        return replace(open_data(settings, state, say), periodic=self._tasks.periodic(settings))


def open_data(settings: Settings, state: TrainState, say: Callable[[str], None]) -> RunData:
    """Open what a run at `state` reads. `say` gets the table of each split's datasets."""
    plan = shared_plan(settings.data, num_samples(settings, state), say)
    train, valid, _ = open_datasets(settings.data, plan)
    for split, each in zip(SPLITS, plan.splits):
        for line in describe_split(split, each) if each is not None else ():
            say(line)
    eod = None
    if settings.data.reset_attention_mask:
        eod = build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model).eod
    name = plan.splits[0].sources[0].prefix
    vocab_size = settings.model.vocab_size
    if valid is None:
        return RunData(Sampler(train, vocab_size, name, eod))
    return RunData(Sampler(train, vocab_size, name, eod),
                   partial(validate, settings, validation_sets(settings, valid, name, eod)))
