"""From files to rows: the door through which a run, a dry run or a benchmark gets its fine-tuning data."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_deepseek.data.blend import parse_blend
from megatron_deepseek.data.preprocess.inputs import STANDARD_INPUT, InputFile, find_inputs
from megatron_deepseek.data.tokenizer import HuggingFaceTokenizer, Tokenizer, build_tokenizer
from megatron_deepseek.finetuning.conversation import Group
from megatron_deepseek.finetuning.dataset_info import Entry, find_entry
from megatron_deepseek.finetuning.encode import Encoder, choose_template
from megatron_deepseek.finetuning.formats import to_conversation
from megatron_deepseek.finetuning.preferences import to_labelled, to_pair
from megatron_deepseek.finetuning.reading import check_packages
from megatron_deepseek.finetuning.settings import CONVERSATIONS, LABELLED, PAIRS, SCORED, DataSettings
from megatron_deepseek.finetuning.summary import Counts
from megatron_deepseek.finetuning.templates import Rules, Template
from megatron_deepseek.finetuning.tokenise import Job, tokenise

VERSION = 2
_READERS = {CONVERSATIONS: lambda row: Group((to_conversation(row),)), PAIRS: to_pair, SCORED: to_pair,
            LABELLED: to_labelled}


@dataclass(frozen=True)
class Prepared:
    """Tokenised datasets. `prefixes` are their indexed files, `names` what the user calls them, `weights` the blend's.

    `template` is the one that was used, never "auto"; `mask_rule` says in a line what carries loss; `pad` is the id
    behind a row's samples, whatever it is: what carries loss is decided by weights, never by ids.
    """

    settings: DataSettings
    template: str
    mask_rule: str
    prefixes: tuple[str, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    counts: tuple[Counts, ...]
    pad: int

    @property
    def total(self) -> Counts:
        """Return the counts of all datasets together."""
        return sum(self.counts, Counts())


@dataclass(frozen=True)
class Source:
    """One dataset of the command line: its files, for LLaMA-Factory's the entry that names its columns, and the kind of
    its rows (DataSettings).
    """

    name: str
    files: tuple[InputFile, ...]
    entry: Entry | None
    kind: str = CONVERSATIONS

    def convert(self, row, _file: int) -> Group:
        return _READERS[self.kind](row if self.entry is None else self.entry.change(row))


def prepare(settings: DataSettings, say: Callable[[str], None] = print) -> Prepared:
    """Tokenise what the cache does not hold yet, and return where it lies.

    Safe for any number of processes that share the cache's file system: one works, the others wait for it. A run that
    has ranks should call it on one rank first. Raise ValueError, in one line, for whatever is wrong.
    """
    sources, weights = find_sources(settings)
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    template = choose_template(settings.template, tokenizer, settings.tokenizer_model)
    encoder = Encoder(tokenizer, template, rules_of(settings), settings.tokenizer_model or settings.tokenizer_type)
    prefixes, counts = [], []
    for source in sources:
        job = _job(settings, source, encoder)
        counts.append(_tokenise(job, settings, source, say))
        prefixes.append(job.prefix)
        if not counts[-1].samples:
            raise ValueError(_nothing(settings, source, counts[-1]))
    return Prepared(settings, template.name, mask_rule(template, settings), tuple(prefixes),
                    tuple(source.name for source in sources), weights, tuple(counts), tokenizer.eod)


def _tokenise(job: Job, settings: DataSettings, source: Source, say: Callable[[str], None]) -> Counts:
    try:
        return tokenise(job, say)
    except OSError as error:
        raise ValueError(f"{settings.option} {source.name}: cannot write to the cache {job.folder}: "
                         f"{error.strerror or error}; --data-cache-path puts it elsewhere") from error


def rules_of(settings: DataSettings) -> Rules:
    return Rules(settings.history_reasoning, settings.train_think_prefix)


def _nothing(settings: DataSettings, source: Source, counts: Counts) -> str:
    why = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items()) or "no rows at all"
    return (f"{settings.option} {source.name}: nothing with loss in the whole set of {counts.rows} rows ({why}); "
            "look at loss flags and --max-length")


def find_sources(settings: DataSettings) -> tuple[list[Source], tuple[float, ...] | None]:
    """Return the datasets of the command line and the weights of their blend."""
    blend = parse_blend(settings.dataset, settings.option)
    sources = [_source(name, settings.option, settings.kind) for name in blend.prefixes]
    return sources, blend.weights


def _source(name: str, option: str, kind: str) -> Source:
    if name == STANDARD_INPUT:
        raise ValueError(f"{option} -: standard input can be read only once; write it to a file")
    entry = find_entry(name, option)
    if entry is not None and entry.ranking and kind == CONVERSATIONS:
        raise ValueError(f"{option} {name}: a dataset of rankings (ranking true) is for preference tuning; --objective "
                         "dpo trains on it")
    try:
        files = tuple(find_inputs([name if entry is None else str(entry.file)]))
    except ValueError as error:
        raise ValueError(str(error).replace("--input", option, 1)) from error
    for file in files:
        if file.format == "text":
            raise ValueError(f"{option} {file.path}: plain text has no conversations; give JSON, JSONL or parquet")
    check_packages(list(files), option)
    return Source(name, files, entry, kind)


def _job(settings: DataSettings, source: Source, encoder: Encoder) -> Job:
    key = _key(settings, source, encoder.template, encoder.tokenizer)
    root = settings.data_cache_path or Path(source.files[0].path).parent / "cache"
    return Job(source.files, source.convert, encoder, settings.tokenizer_model, settings.longest, settings.overlong,
               settings.split_turns, settings.max_bad_rows, settings.num_workers, Path(root) / "finetuning" / key,
               has_values=settings.kind != CONVERSATIONS, ends_are_read=settings.kind == SCORED)


def _key(settings: DataSettings, source: Source, template: Template, tokenizer: Tokenizer) -> str:
    """Return a hash of all that decides the tokens: the files' content, the template, its rules and the tokenizer."""
    entry = None if source.entry is None else [source.entry.formatting, dict(source.entry.columns),
                                               dict(source.entry.tags)]
    decided = [VERSION, [_digest(file.path) for file in source.files], [file.format for file in source.files], entry,
               template.name, settings.history_reasoning, settings.train_think_prefix, settings.longest,
               settings.overlong, settings.split_turns, _tokenizer_digest(tokenizer)]
    decided += [] if settings.kind == CONVERSATIONS else [settings.kind]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:32]


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return type(tokenizer).__name__
    return _digest(tokenizer.path) + str((tokenizer.bos, tokenizer.eod))


def _digest(path: str | os.PathLike) -> str:
    """Return a hash of a file's content: a copy of a file elsewhere has the same tokens."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def mask_rule(template: Template, settings: DataSettings) -> str:
    """Return a line that says what carries loss."""
    forced = {"lines": "<think>\\n", "bare": "<think>"}.get(template.thinks)
    prefix = "" if forced is None else (
        f", the forced {forced} too (--train-think-prefix)" if settings.train_think_prefix else
        f", not the forced {forced}")
    history = "dropped" if template.drops_history(rules_of(settings)) else "kept"
    handling = f"{history} (--history-reasoning {settings.history_reasoning})"
    if settings.split_turns != "none":
        handling += f"; each answer with reasoning is a sample of its own (--split-turns {settings.split_turns})"
    return (f"loss on what the assistant emits, end of sentence included, times the turn's weight{prefix}; "
            f"reasoning before the last question is {handling}")


def refuse_same(train: Prepared, evaluation: Prepared) -> None:
    """Raise ValueError where an evaluation set holds the same samples as a training set."""
    for prefix, name in zip(evaluation.prefixes, evaluation.names):
        for theirs, other in zip(train.prefixes, train.names):
            if _same(prefix, theirs):
                raise ValueError(f"{evaluation.settings.option} {name} is the same as {train.settings.option} {other}: "
                                 "a held-out loss needs conversations that are not trained on; split the file")


def _same(prefix: str, other: str) -> bool:
    if prefix == other:
        return True
    endings = (".bin", ".idx")
    return (all(os.path.getsize(prefix + each) == os.path.getsize(other + each) for each in endings)
            and all(_digest(prefix + each) == _digest(other + each) for each in endings))
