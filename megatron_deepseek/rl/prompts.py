"""Prompts: read from files on rank 0, written in a template, and drawn in an order that seed and number decide."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_deepseek.data.preprocess.inputs import InputFile, find_inputs
from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer
from megatron_deepseek.finetuning.conversation import BadRow, Conversation, Turn
from megatron_deepseek.finetuning.encode import Encoder, choose_template
from megatron_deepseek.finetuning.messages import read_messages, read_tools, text_of
from megatron_deepseek.finetuning.reading import check_packages, parse_line, parts_of, read_rows
from megatron_deepseek.finetuning.templates import Rules
from megatron_deepseek.inference.text import prompt_ids
from megatron_deepseek.rl_settings import ReinforcementSettings
from megatron_deepseek.settings import DataSettings

TEXT = "none"  # of --template: no template
ANSWER = "answer"  # the column in which rewards find what is right
_COLUMNS = ("prompt", "messages")


@dataclass(frozen=True)
class Prompt:
    """What the model is asked with: the ids, forced prefix included; what these say; and the row of the file."""

    ids: tuple[int, ...]
    text: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run. `too_long`: how many were left out for their length, `bad` for other reasons."""

    prompts: tuple[Prompt, ...]
    too_long: int = 0
    bad: int = 0


@dataclass(frozen=True)
class PromptOrder:
    """The order of an endless sequence of prompts: each epoch has all `count` of them, in an order of its own."""

    count: int
    seed: int

    def places(self, begin: int, number: int) -> list[int]:
        """Return the places, among all prompts, of `number` successive elements of the sequence from `begin` on."""
        epochs = {epoch: np.random.default_rng((self.seed, epoch)).permutation(self.count)
                  for epoch in range(begin // self.count, (begin + number - 1) // self.count + 1)}
        return [int(epochs[each // self.count][each % self.count]) for each in range(begin, begin + number)]


class PromptReader:
    """Makes prompts of rows. Raise ValueError for a tokenizer that does not fit the template."""

    def __init__(self, settings: ReinforcementSettings, tokenizer: Tokenizer, tokenizer_name: str | None):
        self.settings, self.tokenizer, self.tokenizer_name = settings, tokenizer, tokenizer_name
        if settings.template != TEXT:
            assert self.encoder

    @cached_property
    def encoder(self) -> Encoder:
        template = choose_template(self.settings.template, self.tokenizer, self.tokenizer_name)
        return Encoder(self.tokenizer, template, Rules("as-release", False), self.tokenizer_name or "tokenizer")

    @property
    def thinking(self) -> bool:
        """Return whether an answer begins with thoughts: as asked, or else with R1's template."""
        asked = self.settings.thinking
        return self.encoder.template.thinks == "lines" if asked is None else asked

    def read(self, row: Any) -> Prompt:
        """Return the prompt of a row. Raise BadRow for one that cannot be used."""
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"a row must be an object with a prompt, this is a {type(row).__name__}")
        ids = self._ids(row)
        answer = {} if self.settings.answer_column is None else {ANSWER: _column(row, self.settings.answer_column)}
        return Prompt(tuple(ids), self.tokenizer.decode(ids), {**row, **answer})

    def _ids(self, row: Mapping[str, Any]) -> list[int]:
        asked = _column(row, *([self.settings.prompt_column] if self.settings.prompt_column else _COLUMNS))
        if self.settings.template != TEXT:
            return self.encoder.prompt(_conversation(row, asked), self.thinking)
        if not isinstance(asked, str):
            raise BadRow("messages without a template", f"--template {TEXT} takes texts, and the row has messages")
        return prompt_ids(self.tokenizer, asked)


def _column(row: Mapping[str, Any], *names: str) -> Any:
    """Return what a row has under the first of `names` that it has. Raise BadRow where it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadRow("missing column", f"the row has no {' or '.join(names)}; it has {', '.join(map(repr, list(row)[:8]))}")


def _conversation(row: Mapping[str, Any], asked: Any) -> Conversation:
    """Return the conversation up to where the answer begins: an assistant's last message is what it is to be."""
    if isinstance(asked, str):
        turns = [Turn("user", asked)]
    else:
        turns = list(read_messages(asked))
        if turns and turns[-1].role == "assistant":
            turns.pop()
    if row.get("system"):
        turns.insert(0, Turn("system", text_of(row["system"], "system")))
    if not turns or turns[-1].role not in ("user", "tool"):
        raise BadRow("no question at the end", "the messages do not end in a user's or a tool's, which could be "
                                               "answered")
    return Conversation(tuple(turns), read_tools(row.get("tools")))


def read_prompts(option: str, patterns: Sequence[str], settings: ReinforcementSettings, data: DataSettings,
                 longest_completion: int, say: Callable[[str], None]) -> Prompts:
    """Read the prompts of the files that `option` names.

    Raise ValueError, in one line, for files without any, and for too many bad rows.
    """
    files = _files(option, patterns)
    reader = PromptReader(settings, build_tokenizer(data.tokenizer_type, data.tokenizer_model), data.tokenizer_model)
    most = data.seq_length - longest_completion
    most = min(most, settings.max_prompt_length or most)
    found, bad, too_long = [], 0, 0
    for where, row in _rows(files):
        try:
            prompt = reader.read(parse_line(row))
        except BadRow as error:
            bad += 1
            if bad > settings.max_bad_rows:
                raise ValueError(f"{option} {where}: {error}; --max-bad-rows {settings.max_bad_rows}") from error
            continue
        if len(prompt.ids) > most:
            too_long += 1
        else:
            found.append(prompt)
    if not found:
        raise ValueError(f"{option} {' '.join(patterns)}: there is no prompt of at most {most} tokens in it "
                         f"({too_long} are longer, {bad} rows cannot be read)")
    say(f"{option}: {len(found):,}" + (f"; {too_long:,} of more than {most} tokens are left out" if too_long else "")
        + (f"; {bad:,} rows cannot be read" if bad else ""))
    return Prompts(tuple(found), too_long, bad)


def _files(option: str, patterns: Sequence[str]) -> list[InputFile]:
    try:
        files = find_inputs(patterns)
    except ValueError as error:
        raise ValueError(str(error).replace("--input", option, 1)) from error
    for file in files:
        if file.format == "text":
            raise ValueError(f"{option} {file.path}: plain text has no rows; give JSON, JSONL or parquet")
    check_packages(files, option)
    return files


def _rows(files: list[InputFile]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of all files, each with its place."""
    for part in parts_of(files):
        for line, row in read_rows(part, files[part.file]):
            yield f"{files[part.file].path} line {line}", row
