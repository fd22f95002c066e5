"""Prompts of held-out conversations, to generate sample answers from, and the reference answers beside them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.finetuning.conversation import BadRow, Conversation
from megatron_deepseek.finetuning.encode import Encoder, choose_template
from megatron_deepseek.finetuning.prepare import find_sources, rules_of
from megatron_deepseek.finetuning.reading import parse_line, parts_of, read_rows
from megatron_deepseek.finetuning.settings import DataSettings


@dataclass(frozen=True)
class Prompt:
    """The ids that a model is asked with, forced prefix included; `text` shows them, `answer` is the one in the file.

    `answer` is the text of the last assistant turn without its reasoning; `thinking` says whether that turn had any.
    """

    ids: tuple[int, ...]
    text: str
    answer: str
    thinking: bool


def held_out_prompts(settings: DataSettings, count: int | None = None) -> list[Prompt]:
    """Return the prompts before the last assistant turn of the first `count` conversations (None: of all).

    Bad rows are passed over, and so are conversations that end after a tool's output: `prepare` has told them.
    """
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    template = choose_template(settings.template, tokenizer, settings.tokenizer_model)
    encoder = Encoder(tokenizer, template, rules_of(settings), settings.tokenizer_model or settings.tokenizer_type)
    return list(itertools.islice(_prompts(settings, encoder), count))


def _prompts(settings: DataSettings, encoder: Encoder) -> Iterator[Prompt]:
    for conversation in conversations(settings):
        *before, last = conversation.turns
        if before[-1].role != "user":
            continue
        thinking = last.reasoning is not None
        try:
            ids = encoder.prompt(Conversation(tuple(before), conversation.tools), thinking)
        except BadRow:
            continue
        yield Prompt(tuple(ids), encoder.tokenizer.decode(ids), last.content, thinking)


def conversations(settings: DataSettings) -> Iterator[Conversation]:
    """Yield the conversations of all datasets in the order of their files, without the bad rows."""
    for source in find_sources(settings)[0]:
        for part in parts_of(list(source.files)):
            for _, content in read_rows(part, source.files[part.file]):
                try:
                    yield source.convert(parse_line(content), part.file).conversations[0]
                except BadRow:
                    continue
