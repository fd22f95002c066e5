"""Prompts of held-out conversations, to generate sample answers from, and the reference answers beside them."""

from dataclasses import dataclass

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
    """Return the prompts before the last assistant turn of the first `count` conversations (None: of all)."""
    raise NotImplementedError
