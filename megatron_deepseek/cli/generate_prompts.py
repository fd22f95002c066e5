"""The prompts of generate.py: one on the command line, or a JSONL file of texts, ids and chats.

A line is {"prompt": "text" or [ids]} or {"messages": [...]}, which the model's chat template makes a prompt of, with
"tools" and "thinking" if wanted. Any other key is a field of SamplingParameters, of this line alone. All lines are
read and checked before a model is loaded.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_deepseek.foreign_json import parse_json
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.text import prompt_ids
from megatron_deepseek.serving.chat import ChatFormat
from megatron_deepseek.data.tokenizer import Tokenizer

OTHER_NAMES = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens"}
_NOT_WRITTEN = ("chosen_experts", "drawn_logprobs", "kept_ids", "grammar")  # in answers' lines
_FIELDS = tuple(field.name for field in fields(SamplingParameters) if field.name not in _NOT_WRITTEN)
_KEYS = ("prompt", "messages", "tools", "thinking", "id")


@dataclass(frozen=True)
class PromptLine:
    """Line `number` of the file, from 1: what the model is asked. `digest` is of all that the answer depends on;
    `shown` is repeated beside it.
    """

    number: int
    ids: tuple[int, ...]
    parameters: SamplingParameters
    digest: str
    shown: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Makes prompts of lines. `chat` gives the chat format, for files that have messages; `model` names what the
    answers are made by, for their digest. A request is checked by `check`, with the longest text in mind.
    """

    tokenizer: Tokenizer
    chat: Callable[[], ChatFormat]
    parameters: SamplingParameters
    model: str
    check: Callable[[list[int], SamplingParameters], None]

    def lines(self, path: Path) -> list[PromptLine]:
        """Return all prompts of a file, without empty lines. Raise ValueError that names the line that is wrong."""
        return list(self._lines(path))

    def _lines(self, path: Path) -> Iterator[PromptLine]:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"--prompts {path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            found = parse_json(line, where)
            if not isinstance(found, dict):
                raise ValueError(f"{where} is no JSON object with a \"prompt\" or \"messages\"")
            try:
                yield self.line(number, found)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error

    def line(self, number: int, found: dict) -> PromptLine:
        """Return the prompt of an object. Raise ValueError for one that cannot be asked."""
        if ("prompt" in found) == ("messages" in found):
            raise ValueError("it must have either \"prompt\" or \"messages\"")
        parameters = self._parameters(number, found)
        ids = self._ids(found)
        self.check(ids, parameters)
        shown = {key: found[key] for key in ("id", "prompt", "messages") if key in found}
        asked = json.dumps([self.model, ids, repr(parameters)])
        return PromptLine(number, tuple(ids), parameters, hashlib.sha256(asked.encode()).hexdigest()[:16], shown)

    def _parameters(self, number: int, found: dict) -> SamplingParameters:
        """Return the sampling of a line; each line has a seed of its own, whatever is answered beside it."""
        given = {OTHER_NAMES.get(key, key): value for key, value in found.items() if key not in _KEYS}
        unknown = sorted(set(given) - set(_FIELDS))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is neither one of {', '.join(_KEYS)} nor of {', '.join(_FIELDS)}")
        base = replace(self.parameters, seed=(self.parameters.seed or 0) + number)
        return replace(base, **given)

    def _ids(self, found: dict) -> list[int]:
        if "messages" in found:
            return list(self.chat().question({key: found.get(key) for key in ("messages", "tools", "thinking")}).prompt)
        prompt = found["prompt"]
        if isinstance(prompt, str):
            return prompt_ids(self.tokenizer, prompt)
        if not isinstance(prompt, list) or not all(type(each) is int for each in prompt):
            raise ValueError("\"prompt\" is neither a text nor a list of token ids")
        return prompt
