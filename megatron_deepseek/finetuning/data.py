"""From a run's settings to its conversations: the sets that it trains on and those that it holds out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.finetuning import settings as data_settings
from megatron_deepseek.finetuning.plan import batches_of
from megatron_deepseek.finetuning.prepare import Prepared, prepare, refuse_same
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.settings import Settings


@dataclass(frozen=True)
class Conversations:
    """The tokenised sets of a run. `rows_per_epoch` are those of `train`."""

    train: Prepared
    held_out: tuple[Prepared, ...]
    rows_per_epoch: int

    @property
    def num_samples(self) -> int:
        return sum(counts.samples for counts in self.train.counts)


def prepare_all(settings: Settings, say: Callable[[str], None]) -> Conversations:
    """Tokenise what is not in the cache. Raise ValueError for conversations that cannot be trained on."""
    train = prepare(training_set(settings), say)
    held_out = tuple(prepare(each, say) for each in held_out_sets(settings))
    for each in held_out:
        refuse_same(train, each)
    rows = Rows(train)
    if train.settings.kind == data_settings.LABELLED:
        refuse_one_label(rows)
    return Conversations(train, held_out, rows.rows_per_epoch)


def refuse_one_label(rows: Rows) -> None:
    """Raise ValueError unless there are good and bad answers: KTO needs both."""
    good = sum(int((values > 0).sum()) for values in rows.values)
    bad = sum(len(values) for values in rows.values) - good
    if not good or not bad:
        raise ValueError(f"--objective kto needs good and bad answers: {' '.join(rows.prepared.settings.dataset)} has "
                         f"{good} with the label true and {bad} with false")


def training_set(settings: Settings) -> data_settings.DataSettings:
    return _of(settings, settings.fine_tuning.dataset, "--dataset")


def _kind(settings: Settings) -> str:
    """Return what a row of the files is for the objective."""
    preference = settings.fine_tuning.preference
    if preference is None:
        return data_settings.CONVERSATIONS
    special = {"kto": data_settings.LABELLED, "reward": data_settings.SCORED}
    return special.get(preference.objective, data_settings.PAIRS)


def held_out_sets(settings: Settings) -> list[data_settings.DataSettings]:
    return [_of(settings, (file,), "--eval-dataset") for file in settings.fine_tuning.eval_dataset]


def _of(settings: Settings, files: tuple[str, ...], option: str) -> data_settings.DataSettings:
    """Return what decides the rows of `files`: fields of the same names, of fine-tuning first, then of the data."""
    names = {each.name for each in fields(data_settings.DataSettings)} - {"dataset", "option", "kind"}
    given = {name: getattr(part, name) for part in (settings.data, settings.fine_tuning)
             for name in names if hasattr(part, name)}
    return data_settings.DataSettings(files, option=option, kind=_kind(settings), **given)


def with_tokenizer(settings: Settings) -> Settings:
    """Return the settings with the tokenizer that is with --load where none is given."""
    data, load = settings.data, settings.run.load
    if data.tokenizer_model is not None or data.tokenizer_type != "HuggingFaceTokenizer" or load is None:
        return settings
    return replace(settings, data=replace(data, tokenizer_model=tokenizer_with(load)))


def tokenizer_with(load: Path) -> str:
    """Return the directory of the tokenizer that is with the weights of --load. Raise ValueError if there is none."""
    found = next((each for each in (load, load / DIRECTORY) if (each / "tokenizer.json").is_file()), None)
    if found is None:
        raise ValueError(f"--load {load} has no tokenizer.json with it: --tokenizer-model must name one")
    return str(found)


def with_length(settings: Settings, rows_per_epoch: int) -> Settings:
    """Return the settings with the length of --epochs in rows."""
    if settings.run.epochs is None:
        return settings
    return replace(settings, run=replace(settings.run, train_samples=settings.run.epochs * rows_per_epoch))


def num_batches(settings: Settings, rows_per_epoch: int) -> int:
    """Return the batches of an evaluation: --eval-iters, or all rows, the last batch filled up with blank ones."""
    every = math.ceil(batches_of(rows_per_epoch, settings.batch.global_batch_size))
    return min(settings.run.eval_iters or every, every)


def name_of(prepared: Prepared) -> str:
    return Path(prepared.names[0]).name
