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
from megatron_deepseek.runtime.job import run_job
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.resume import num_samples
from megatron_deepseek.runtime.task import Prepared, RunData, Task
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.acceptance import Validation, mean_acceptance
from megatron_deepseek.training.next_token import SourceSum, by_source
from megatron_deepseek.training.trainer import Trainer


def pretrain(settings: Settings) -> None:
    """Run the job of `settings` on this rank. A user's mistake in data or checkpoint ends it with status 2."""
    run_job(Pretraining(), settings)


class Pretraining(Task):
    """The task of pre-training."""

    def check(self, settings: Settings) -> Settings:
        settings = replace(settings, data=with_mock_data(settings.data))
        check_data(settings.data, settings.model.vocab_size, num_samples(settings))
        return settings

    def prepare(self, settings: Settings) -> Prepared:
        """Return the task as it is: indices are built when it is known how many samples are left."""
        return Prepared(replace(settings, data=with_mock_data(settings.data)), open_data)


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
    if valid is None or not settings.run.eval_iters:
        return RunData(Sampler(train, vocab_size, name, eod))
    return RunData(Sampler(train, vocab_size, name, eod),
                   partial(validate, settings, Sampler(valid, vocab_size, name, eod)))


def validate(settings: Settings, data: Sampler, trainer: Trainer, report: Report, iteration: int) -> None:
    """Report the mean losses of eval_iters batches, the same ones every time."""
    batch = settings.batch
    batches = data.evaluation(settings.run.eval_iters, batch.global_batch_size, batch.micro_batch_size,
                              trainer.meshes.rank("dp"), settings.layout.dp)
    objective = Validation(trainer.objective.num_depths)
    losses = [trainer.evaluate(each.to(trainer.meshes.device), objective) for each in batches]
    if not any(each.num_labels for each in losses):
        report.message("validation: all labels are masked; its loss of 0 says nothing")
    sums = [SourceSum(*map(sum, zip(*batches))) for batches in zip(*[each.sources for each in losses])]
    report.validation(iteration, _mean([each.lm_loss for each in losses]),
                      tuple(map(_mean, zip(*[each.mtp_loss for each in losses]))),
                      by_source(data.source_names, sums)[0], mean_acceptance(losses))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
