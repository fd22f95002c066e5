"""A request for /v1/chat/completions: what it asks the engine, and how its answers are to be shown.

Messages, tools and the form of the answer are the chat form's to read (chat/); the rest is read here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.serving.answer_fields import answer_fields
from megatron_deepseek.serving.chat import CHAT_FIELDS, GRAMMAR_FIELDS, ChatFormat, Question
from megatron_deepseek.serving.errors import ApiError, from_words
from megatron_deepseek.serving.fields import Fields
from megatron_deepseek.serving.sampling_fields import MAX_LOGPROBS, answer_length, read_sampling, with_length
from megatron_deepseek.serving.service import Service
from megatron_deepseek.serving.stream_options import StreamOptions
from megatron_deepseek.serving.ticket import Ask

_LENGTHS = ("max_completion_tokens", "max_tokens")
_OTHERS = ("model", "messages", "logprobs", "top_logprobs", "stream", "stream_options", "user", "return_token_ids",
           "return_tokens_as_token_ids", "metadata", "store", "service_tier", *CHAT_FIELDS, *GRAMMAR_FIELDS, *_LENGTHS)


@dataclass(frozen=True)
class ChatRequest:
    """What was asked, checked. `question` is the chat form's: it makes a parser for each answer. `logprobs` is the
    number of likeliest tokens shown, None for no log-probabilities.
    """

    ask: Ask
    model: str
    question: Question
    stream: StreamOptions | None
    logprobs: int | None
    prompt_logprobs: int | None
    token_ids: bool
    tokens_as_ids: bool


def read_chat(body: dict, service: Service) -> ChatRequest:
    """Return the request of a body. Raise ApiError that names the field which cannot be."""
    fields = answer_fields(body, _OTHERS, service.model)
    if service.chat is None:
        raise ApiError(400, "The model's tokenizer has no chat template: use /v1/completions", "messages")
    base = read_sampling(fields, service.model.defaults, _logprobs(fields))
    service.limits.admit(base.n, 0)  # before the messages are read
    question = ask_in_form(service.chat, body)
    prompt = service.checked(list(question.prompt), base, "messages")
    length = answer_length(fields, _LENGTHS, service.model.usual_length, len(prompt), service.model.defaults)
    if not length:
        raise fields.fault("max_tokens", "is 0; it must be at least 1")
    parameters = question.sampling(with_length(base, length))
    service.checked(prompt, parameters, "messages")
    return ChatRequest(
        Ask((prompt,), [parameters]), service.model.name, question, StreamOptions.read(fields), base.logprobs,
        base.prompt_logprobs, fields.boolean("return_token_ids"), fields.boolean("return_tokens_as_token_ids"))


def ask_in_form(chat: ChatFormat, body: Mapping[str, Any]) -> Question:
    """Return the question of a body in the chat form; raise ApiError that names the field which cannot be.

    The form's messages begin with the field's path: `messages[2].content: must be a text`.
    """
    try:
        return chat.question(body)
    except ValueError as error:
        raise from_words(str(error), "messages") from error


def _logprobs(fields: Fields) -> int | None:
    """Return how many likeliest tokens are asked for: `top_logprobs` where `logprobs` is true."""
    wanted, number = fields.boolean("logprobs"), fields.integer("top_logprobs", least=0, most=MAX_LOGPROBS)
    if number and not wanted:
        raise fields.fault("top_logprobs", "needs logprobs to be true")
    return (number or 0) if wanted else None
