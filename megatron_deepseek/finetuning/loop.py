"""Fine-tuning: rows of conversations, and the mean over their tokens or samples of what the assistant says.

The job and its loop are pre-training's (runtime/job.py, runtime/loop.py).
"""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.evaluation.while_training import TrainingTasks
from megatron_deepseek.finetuning.answers import Answers
from megatron_deepseek.finetuning.data import (
    Conversations,
    name_of,
    num_batches,
    prepare_all,
    with_length,
    with_tokenizer,
)
from megatron_deepseek.finetuning.distillation.task import check_distillation, with_distillation
from megatron_deepseek.finetuning.held_out import Evaluation, EvaluationSet
from megatron_deepseek.finetuning.noise import NoisySampler
from megatron_deepseek.finetuning.objectives import objective_of
from megatron_deepseek.finetuning.preference.task import with_preference
from megatron_deepseek.finetuning.prompts import held_out_prompts
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.start_notes import start_notes
from megatron_deepseek.runtime.first_rank import await_check, tell_checked
from megatron_deepseek.runtime.job import run_job
from megatron_deepseek.runtime.task import Periodic, Prepared, RunData, Task
from megatron_deepseek.settings import Settings


def finetune(settings: Settings) -> None:
    """Run the job of `settings` on this rank. A user's mistake in data or checkpoint ends it with status 2."""
    run_job(FineTuning(), settings)


class FineTuning(Task):
    """The task of fine-tuning. Rank 0 tokenises before the job is joined, since that may take hours."""

    def __init__(self):
        self._conversations: Conversations | None = None  # on rank 0, from its check to its preparation
        self._tasks = TrainingTasks()

    def check(self, settings: Settings) -> Settings:
        settings = with_tokenizer(settings)
        self._tasks.load(settings)
        self._conversations = prepare_all(settings, partial(print, flush=True))
        if settings.fine_tuning.distillation is not None:
            check_distillation(settings, self._conversations.train)
        tell_checked()
        return with_length(settings, self._conversations.rows_per_epoch)

    def wait(self) -> None:
        await_check()

    def conversations(self, settings: Settings) -> tuple[Settings, Conversations]:
        """Return on all ranks what rank 0 has tokenised, and the settings with what only that tells."""
        told = [self._conversations]
        dist.broadcast_object_list(told)
        (conversations,) = told
        return with_length(with_tokenizer(settings), conversations.rows_per_epoch), conversations

    def prepare(self, settings: Settings) -> Prepared:
        """Return what rank 0 has prepared, on all ranks, which read the same files."""
        settings, conversations = self.conversations(settings)
        depths, scale = settings.model.num_nextn_predict_layers, settings.loss.mtp_loss_scaling_factor
        prepared = Prepared(
            settings, partial(_open_conversations, conversations, self._tasks),
            objective_of(settings.fine_tuning.loss_average, depths, scale),
            {prefix: [counts.samples, counts.tokens] for prefix, counts
             in zip(conversations.train.prefixes, conversations.train.counts)},
            tuple(start_notes(settings, conversations)))
        if settings.fine_tuning.distillation is not None:
            return with_distillation(prepared, conversations)
        return prepared if settings.fine_tuning.preference is None else with_preference(prepared, conversations)


def _open_conversations(conversations: Conversations, tasks: TrainingTasks, settings: Settings, state: TrainState,
                        say: Callable[[str], None]) -> RunData:
    rows = Rows(conversations.train, settings.run.epochs)
    vocab_size, tuning = settings.model.vocab_size, settings.fine_tuning
    train = Sampler(rows, vocab_size, f"--dataset {' '.join(tuning.dataset)}")
    if tuning.neftune_alpha:
        train = NoisySampler(train, rows, tuning.neftune_alpha, settings.model.hidden_size, settings.run.seed)
    sets = []
    for each in conversations.held_out if settings.run.eval_interval else ():
        held_out = Rows(each, epochs=1, shuffle=False)
        sampler = Sampler(held_out, vocab_size, f"--eval-dataset {' '.join(each.settings.dataset)}")
        sets.append(EvaluationSet(name_of(each), sampler, num_batches(settings, held_out.rows_per_epoch)))
    return RunData(train, Evaluation(settings, sets) if sets else None,
                   (*_periodic_answers(conversations, settings), *tasks.periodic(settings)))


def _periodic_answers(conversations: Conversations, settings: Settings) -> tuple[Periodic, ...]:
    tuning = settings.fine_tuning
    if tuning.generate_every is None:
        return ()
    told = [None]
    if dist.get_rank() == 0:
        told = [held_out_prompts(conversations.held_out[0].settings, tuning.generate_prompts)]
    dist.broadcast_object_list(told)
    return (Periodic(tuning.generate_every, Answers(settings, name_of(conversations.held_out[0]), told[0])),)
