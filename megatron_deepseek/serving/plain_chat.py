"""Chats without tools, until serving/chat has all of them: the same calls, content and reasoning alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.finetuning.chat import ChatFormat
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.sampling_parameters import SamplingParameters


@dataclass(frozen=True)
class Delta:
    """A piece of an answer's message, under its field's name."""

    name: str
    text: str

    def fields(self) -> dict:
        return {self.name: self.text}


@dataclass
class PlainParser:
    """Splits an answer at the token that ends reasoning."""

    format: ChatFormat
    shown: dict[str, str] = field(default_factory=dict)

    def update(self, output: Output) -> list[Delta]:
        reasoning, content = self._split(output)
        deltas = []
        for name, text in (("reasoning_content", reasoning), ("content", content)):
            before = self.shown.get(name, "")
            if len(text) > len(before):
                deltas.append(Delta(name, text[len(before):]))
                self.shown[name] = text
        return deltas

    def _split(self, output: Output) -> tuple[str, str]:
        if not self.format.begins_with_thought:
            return "", output.text
        end = self.format.end_of_thought
        if end not in output.tokens:
            return output.text, ""
        place = output.tokens.index(end)
        return output.text[:output.text_ends[place - 1] if place else 0], output.text[output.text_ends[place]:]

    def finish_reason(self, output: Output) -> str | None:
        return output.finish_reason

    def message(self) -> dict:
        return {"role": "assistant", "content": None, **self.shown}


@dataclass(frozen=True)
class PlainQuestion:
    """A chat as a prompt."""

    format: ChatFormat
    prompt: list[int]

    def sampling(self, parameters: SamplingParameters) -> SamplingParameters:
        return parameters

    def parser(self) -> PlainParser:
        return PlainParser(self.format)


@dataclass(frozen=True)
class PlainChat:
    """The form of a model's chats."""

    format: ChatFormat

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: str | None, template: str = "auto", thinking: bool | None = None
           ) -> "PlainChat":
        return cls(ChatFormat.of(tokenizer, folder, template, thinking))

    @property
    def name(self) -> str:
        return self.format.template.name

    def question(self, body: Mapping[str, Any]) -> PlainQuestion:
        if not isinstance(body.get("messages"), list):
            raise ValueError("messages: must be a list")
        return PlainQuestion(self.format, self.format.prompt(body["messages"], body.get("tools") or ()))
