"""Preference tuning as a task: supervised fine-tuning's rows, with what the objective reads beside them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.finetuning import prepare
from megatron_deepseek.finetuning.data import Conversations, name_of, num_batches
from megatron_deepseek.finetuning.held_out import EvaluationSet
from megatron_deepseek.finetuning.preference.completion import completion_of
from megatron_deepseek.finetuning.preference.held_out import PreferenceEvaluation
from megatron_deepseek.finetuning.preference.inputs import MismatchedSampler, PreferenceSampler
from megatron_deepseek.finetuning.preference.objectives import preference_objective
from megatron_deepseek.finetuning.preference.reference import ReferenceSums, reference_sums
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.runtime.task import Prepared, RunData, TrainingData
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer


def with_preference(supervised: Prepared, conversations: Conversations) -> Prepared:
    """Return the task with the objective of --objective. A reference model is scored before the run's weights are
    loaded; beside adapters the base is the reference, at every step.
    """
    settings = supervised.settings
    preference = settings.fine_tuning.preference
    sums = (ReferenceSums(),) * (1 + len(conversations.held_out))
    task = replace(supervised, objective=preference_objective(preference),
                   open_data=partial(_open, supervised, conversations, sums))
    if not preference.has_reference or settings.lora is not None:
        return task
    return replace(task, before_loading=partial(_with_reference, supervised, conversations, task))


def _with_reference(supervised: Prepared, conversations: Conversations, task: Prepared, trainer: Trainer,
                    origin: str | None) -> Prepared:
    """Return the task with the reference's sums of what is trained on, and of what is held out if that is evaluated."""
    settings = supervised.settings
    held_out = conversations.held_out if settings.run.eval_interval else ()
    sums = reference_sums([conversations.train, *held_out], settings, trainer, origin, partial(print, flush=True))
    return replace(task, open_data=partial(_open, supervised, conversations, sums), before_loading=None)


def _open(supervised: Prepared, conversations: Conversations, sums: list[ReferenceSums], settings: Settings,
          state: TrainState, say: Callable[[str], None]) -> RunData:
    data, complete = supervised.open_data(settings, state, say), completion_of(settings)
    rows = Rows(conversations.train, settings.run.epochs)
    sets = []
    for each, of_set in zip(conversations.held_out if settings.run.eval_interval else (), sums[1:]):
        held_out = Rows(each, epochs=1, shuffle=False)
        sampler = Sampler(held_out, settings.model.vocab_size, _option(each))
        sets.append(EvaluationSet(name_of(each), _sampler(sampler, held_out, of_set, settings),
                                  num_batches(settings, held_out.rows_per_epoch)))
    return replace(data, train=_sampler(data.train, rows, sums[0], settings), complete=complete,
                   validate=PreferenceEvaluation(settings, sets, complete) if sets else None)


def _sampler(sampler: TrainingData, rows: Rows, sums: ReferenceSums, settings: Settings) -> TrainingData:
    made = PreferenceSampler(sampler, rows, sums.answers)
    if settings.fine_tuning.preference.objective != "kto":
        return made
    return MismatchedSampler(made, rows, settings.model.vocab_size, _option(rows.prepared), sums.mismatched)


def _option(prepared: prepare.Prepared) -> str:
    return f"{prepared.settings.option} {' '.join(prepared.settings.dataset)}"
