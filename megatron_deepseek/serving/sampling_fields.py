"""The sampling that a request asks for: OpenAI's fields, and those that vLLM adds to them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.serving.errors import bad_field
from megatron_deepseek.serving.fields import Fields

MAX_LOGPROBS = 20  # likeliest tokens of each place; more of them make answers of megabytes
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 32, 4096  # in number, and in characters of all of them
MAX_BIASES = 1024

# Fields that are fields of SamplingParameters too.
SAMPLING = ("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos", "n", "seed", "prompt_logprobs")


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing: the model's own sampling, and how long its texts may be."""

    sampling: SamplingParameters
    max_model_len: int


def read_sampling(fields: Fields, defaults: Defaults, logprobs: int | None) -> SamplingParameters:
    """Return what the fields ask for, but for the length, with so many `logprobs`.

    Raise ApiError, naming the field, for a value that cannot be.
    """
    given: dict[str, Any] = {name: fields.given(name) for name in SAMPLING if fields.given(name) is not None}
    if given.get("top_k") == -1:  # vLLM's way of saying all
        given["top_k"] = 0
    fields.boolean("ignore_eos")
    fields.integer("prompt_logprobs", most=MAX_LOGPROBS)
    _check_sizes(fields, given)
    longest = replace(defaults.sampling, max_tokens=defaults.max_model_len)
    return _replaced(longest, given | {"logprobs": logprobs})


def with_length(parameters: SamplingParameters, max_tokens: int) -> SamplingParameters:
    """Return the parameters with the length; raise ApiError where `min_tokens` is greater."""
    return _replaced(parameters, {"max_tokens": max_tokens})


def answer_length(fields: Fields, names: tuple[str, ...], usual: int | None, prompt: int, defaults: Defaults) -> int:
    """Return how many tokens the answer to a prompt of `prompt` tokens may have.

    `names` are the fields that may say so, the first one that is there counts; `usual` is what holds where none is,
    None for as many as there is room for. Raise ApiError where prompt and answer are longer than the model's length.
    """
    name = next((each for each in names if fields.given(each) is not None), names[0])
    most = defaults.max_model_len
    if prompt >= most:
        raise bad_field("prompt" if "prompt" in fields.values else "messages",
                        f"the prompt has {prompt} tokens, and the model's length of {most} must leave room for one "
                        "more")
    asked = fields.integer(name, least=0 if name == "max_tokens" else 1)
    if asked is None:
        return min(most - prompt, usual or most)
    if prompt + asked > most:
        raise fields.fault(name, f"is {asked}, and with the {prompt} tokens of the prompt that is more than the "
                                 f"model's length of {most}")
    return asked


def _check_sizes(fields: Fields, given: Mapping[str, Any]) -> None:
    """Raise ApiError for lists that are so long that reading them would take long."""
    stop = given.get("stop")
    if isinstance(stop, list) and (len(stop) > MAX_STOP_STRINGS or any(
            isinstance(each, str) and len(each) > MAX_STOP_LENGTH for each in stop)):
        raise fields.fault("stop", f"has more than {MAX_STOP_STRINGS} texts, or one of more than {MAX_STOP_LENGTH} "
                                   "characters")
    if isinstance(stop, str) and len(stop) > MAX_STOP_LENGTH:
        raise fields.fault("stop", f"has more than {MAX_STOP_LENGTH} characters")
    for name in ("logit_bias", "stop_token_ids"):
        if isinstance(given.get(name), (list, dict)) and len(given[name]) > MAX_BIASES:
            raise fields.fault(name, f"has more than {MAX_BIASES} entries")


def _replaced(parameters: SamplingParameters, values: Mapping[str, Any]) -> SamplingParameters:
    try:
        return replace(parameters, **values)
    except ValueError as error:
        name = str(error).split()[0]
        raise bad_field(name if name in (*SAMPLING, "max_tokens", "logprobs") else None, str(error)) from error
