"""A request for /v1/completions: what it asks the engine, and how its answers are to be shown."""

from dataclasses import dataclass, replace

from megatron_deepseek.inference.grammar import Grammar
from megatron_deepseek.serving.answer_fields import answer_fields
from megatron_deepseek.serving.chat import GRAMMAR_FIELDS, grammar_of
from megatron_deepseek.serving.errors import ApiError, from_words
from megatron_deepseek.serving.fields import Fields, shortly
from megatron_deepseek.serving.sampling_fields import MAX_LOGPROBS, answer_length, read_sampling, with_length
from megatron_deepseek.serving.service import Service
from megatron_deepseek.serving.stream_options import StreamOptions
from megatron_deepseek.serving.ticket import Ask

_OTHERS = ("model", "prompt", "max_tokens", "logprobs", "echo", "stream", "stream_options", "best_of", "user",
           "return_token_ids", "return_tokens_as_token_ids", *GRAMMAR_FIELDS)


@dataclass(frozen=True)
class CompletionRequest:
    """What was asked, checked. `texts` are the prompts as they were written, None for those that are ids.

    `nothing_new`: the engine answers with at least one token; with `max_tokens: 0` it is thrown away. `logprobs` is the
    number of likeliest tokens shown, None for no log-probabilities.
    """

    ask: Ask
    model: str
    texts: tuple[str | None, ...]
    stream: StreamOptions | None
    echo: bool
    logprobs: int | None
    prompt_logprobs: bool
    nothing_new: bool
    token_ids: bool
    tokens_as_ids: bool


def read_completion(body: dict, service: Service) -> CompletionRequest:
    """Return the request of a body. Raise ApiError that names the field which cannot be."""
    fields = answer_fields(body, _OTHERS, service.model)
    echo, logprobs = fields.boolean("echo"), fields.integer("logprobs", least=0, most=MAX_LOGPROBS)
    base = replace(read_sampling(fields, service.model.defaults, logprobs), grammar=_grammar(body))
    if fields.integer("best_of", default=base.n) != base.n:
        raise fields.fault("best_of", f"is {body['best_of']}, and n is {base.n}: they must be equal")
    if echo and logprobs is not None:
        base = replace(base, prompt_logprobs=max(base.prompt_logprobs or 0, logprobs))
    prompts = _prompts(fields)
    service.limits.admit(len(prompts) * base.n, 0)  # before any of them is read
    checked = tuple(service.checked(each, base, "prompt") for each in prompts)
    lengths = [answer_length(fields, ("max_tokens",), 16, len(each), service.model.defaults) for each in checked]
    return CompletionRequest(
        Ask(checked, [with_length(base, max(each, 1)) for each in lengths]), service.model.name,
        tuple(each if isinstance(each, str) else None for each in prompts), StreamOptions.read(fields), echo, logprobs,
        fields.given("prompt_logprobs") is not None, not max(lengths), fields.boolean("return_token_ids"),
        fields.boolean("return_tokens_as_token_ids"))


def _grammar(body: dict) -> Grammar | None:
    """Return what the answers must keep to; raise ApiError that names the field which cannot be."""
    try:
        return grammar_of(body)
    except ValueError as error:
        raise from_words(str(error), "response_format") from error


def _prompts(fields: Fields) -> list[str | list[int]]:
    """Return the prompts: a text, ids, or a list of texts or of ids."""
    prompt = fields.given("prompt")
    if prompt is None:
        raise fields.fault("prompt", "is missing")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise fields.fault("prompt", f"is {shortly(prompt)}, neither a text nor a list")
    if not prompt:
        raise fields.fault("prompt", "is an empty list")
    if all(type(each) is int for each in prompt):
        return [prompt]
    for place, each in enumerate(prompt):
        if not isinstance(each, str) and not (isinstance(each, list) and all(type(one) is int for one in each)):
            raise ApiError(400, f"prompt[{place}] is {shortly(each)}, neither a text nor a list of token ids",
                           f"prompt[{place}]")
    return prompt
