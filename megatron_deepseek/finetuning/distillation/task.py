"""Distillation as a task: supervised fine-tuning's rows, with what a teacher says of them beside them.

--teacher is a directory of weights, which are loaded beside the student, or a cache of predictions.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.finetuning.data import Conversations
from megatron_deepseek.finetuning.distillation.cache_files import CachedDataset, Description, dataset_key, holds_cache
from megatron_deepseek.finetuning.distillation.inputs import CachedSampler
from megatron_deepseek.finetuning.distillation.objective import Distillation
from megatron_deepseek.finetuning.distillation.teacher import LiveTeacher, TeacherFiles, check_teacher
from megatron_deepseek.finetuning.distillation.same_tokens import entries_digest, run_entries
from megatron_deepseek.finetuning.prepare import Prepared as PreparedData
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.planning.binary_units import with_unit
from megatron_deepseek.runtime.task import Prepared, RunData
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer


def check_distillation(settings: Settings, train: PreparedData) -> None:
    """Raise ValueError for a teacher, or a cache, that the run cannot learn from. Rank 0 calls it."""
    teacher = settings.fine_tuning.distillation.teacher
    if not teacher.is_dir():
        raise ValueError(f"--teacher {teacher}: there is no such directory")
    if not holds_cache(teacher):
        check_teacher(settings)
        return
    check_cache(settings)
    for name, each in zip(train.names, open_cache(teacher, train)):
        there = each.open()
        missing = each.num_samples - int(each.done.sum()) if there else each.num_samples
        if missing == each.num_samples:
            raise ValueError(f"--teacher {teacher} has nothing of {train.settings.option} {name} with these tokens and "
                             "loss weights: tools/cache_logits.py with the same data options adds it")
        if missing:
            raise ValueError(f"--teacher {teacher} lacks {missing:,} of {each.num_samples:,} samples of {name}: the "
                             "command of tools/cache_logits.py that made it goes on")


def check_cache(settings: Settings) -> None:
    """Raise ValueError for a cache of other tokens, or of another temperature, than the run's."""
    asked, teacher = settings.fine_tuning.distillation, settings.fine_tuning.distillation.teacher
    made, size = Description.read(teacher), settings.model.vocab_size
    if made.vocab_size > size:
        raise ValueError(f"--teacher {teacher} is a cache of {made.vocab_size} ids, and the student has {size}: "
                         f"tools/cache_logits.py --student-vocab-size {size} makes one without the padding")
    if made.vocabulary != entries_digest(run_entries(settings.data), made.vocab_size):
        raise ValueError(f"--teacher {teacher} is a cache of another tokenizer than {_tokenizer(settings)}: "
                         "probabilities of other tokens cannot be compared")
    if made.kd_temperature != asked.kd_temperature:
        raise ValueError(f"--teacher {teacher} is a cache at --kd-temperature {made.kd_temperature:g}, and "
                         f"--kd-temperature {asked.kd_temperature:g} is asked for: what is left for ids that are not "
                         "in it is known at one temperature alone")


def _tokenizer(settings: Settings) -> str:
    data = settings.data
    return f"--tokenizer-model {data.tokenizer_model}" if data.tokenizer_model else f"the {data.tokenizer_type}"


def open_cache(directory: Path, train: PreparedData) -> tuple[CachedDataset, ...]:
    """Return the cache of each dataset, not yet opened."""
    description = Description.read(directory)
    return tuple(CachedDataset(directory, description, prefix, dataset_key(prefix)) for prefix in train.prefixes)


def with_distillation(supervised: Prepared, conversations: Conversations) -> Prepared:
    """Return the task with the objective of --teacher. A live teacher is loaded before the run's weights are."""
    settings = supervised.settings
    depths, scale = settings.model.num_nextn_predict_layers, settings.loss.mtp_loss_scaling_factor
    distillation = settings.fine_tuning.distillation
    if holds_cache(distillation.teacher):
        made = Description.read(distillation.teacher)
        objective = Distillation(distillation, None, depths, scale, num_ids=made.vocab_size)
        return replace(supervised, objective=objective, open_data=partial(_open_cached, supervised, conversations),
                       notes=(*supervised.notes, f"teacher: the {made.top_k} likeliest of {made.vocab_size:,} ids, as "
                              f"{made.teacher_directory} predicted them"))
    teacher = LiveTeacher(distillation)
    task = replace(supervised, objective=Distillation(distillation, teacher, depths, scale),
                   open_data=partial(_open_live, supervised, teacher),
                   notes=(*supervised.notes, _teacher_note(settings)))
    return replace(task, before_loading=partial(_with_teacher, task, teacher))


def _teacher_note(settings: Settings) -> str:
    """Return how large a live teacher is, which is not in the table of memory."""
    model = TeacherFiles.find(settings.fine_tuning.distillation.teacher).model
    size = model.num_parameters() * (2 if settings.run.bf16 else 4) / settings.layout.world_size
    states = model.hidden_size * settings.data.seq_length * settings.batch.global_batch_size / settings.layout.dp
    return (f"teacher: {model.describe_parameters()}; about {with_unit(size)} of weights on a rank, beside the table "
            f"above, and {with_unit(states * (2 if settings.run.bf16 else 4))} of final states where the head is")


def _with_teacher(task: Prepared, teacher: LiveTeacher, trainer: Trainer, origin: str | None) -> Prepared:
    teacher.open(trainer)
    return replace(task, before_loading=None)


def _open_live(supervised: Prepared, teacher: LiveTeacher, settings: Settings, state: TrainState,
               say: Callable[[str], None]) -> RunData:
    return replace(supervised.open_data(settings, state, say), complete=teacher.complete)


def _open_cached(supervised: Prepared, conversations: Conversations, settings: Settings, state: TrainState,
                 say: Callable[[str], None]) -> RunData:
    data = supervised.open_data(settings, state, say)
    datasets = open_cache(settings.fine_tuning.distillation.teacher, conversations.train)
    for each in datasets:
        each.open()
    return replace(data, train=CachedSampler(data.train, Rows(conversations.train, settings.run.epochs), datasets))
