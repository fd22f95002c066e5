"""The fields of a request for answers, checked as far as completions and chats have them in common."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from megatron_deepseek.serving.fields import Fields
from megatron_deepseek.serving.sampling_fields import SAMPLING
from megatron_deepseek.serving.service import ServedModel

# Fields that would change an answer and are not done: refused unless they have the value that changes nothing.
_NOT_DONE = MappingProxyType({"use_beam_search": False, "suffix": "", "length_penalty": 1.0, "audio": None,
                              "bad_words": [], "allowed_token_ids": None, "truncate_prompt_tokens": None,
                              "include_stop_str_in_output": False, "min_new_tokens": None})


def answer_fields(body: Mapping[str, Any], own: Iterable[str], model: ServedModel) -> Fields:
    """Return the fields of a request, which may be those of sampling and the route's `own`.

    Raise ApiError for a misspelt field, for another model's name, and for a field of other servers that would change
    the answer and is not done here.
    """
    fields = Fields(body)
    fields.refuse_misspelt((*own, *SAMPLING))
    model.check_name(fields.text("model"))
    for name, nothing in _NOT_DONE.items():
        value = fields.given(name)
        if value is not None and value != nothing:
            raise fields.fault(name, "is not supported")
    return fields
