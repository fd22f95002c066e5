"""A chat as a model reads it: messages to the ids that ask for its answer, and its answer to reasoning and text.

The templates are those of fine-tuning (templates.py), so that a model is asked as it was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.finetuning.conversation import BadRow, Conversation, Turn
from megatron_deepseek.finetuning.encode import Encoder, choose_template
from megatron_deepseek.finetuning.messages import read_messages, read_tools, split_reasoning
from megatron_deepseek.finetuning.templates import END_THINK, TEMPLATES, Rules, Template

AUTO = "auto"
CHOICES = (AUTO, *TEMPLATES)


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """How one model is asked. `thinking` says whether the prompt asks it to reason first, where its template can."""

    encoder: Encoder
    thinking: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, tokenizer_model: str | None, template: str = AUTO, thinking: bool | None = None
           ) -> "ChatFormat":
        """Return the format of `template`, or for "auto" of what the tokenizer tells.

        `thinking`: None asks for it where the template forces it, as R1's does. Raise ValueError for a template that
        the tokenizer has no tokens for.
        """
        chosen = choose_template(template, tokenizer, tokenizer_model)
        encoder = Encoder(tokenizer, chosen, Rules(), tokenizer_model or "tokenizer")
        return cls(encoder, chosen.thinks == "lines" if thinking is None else thinking)

    @property
    def template(self) -> Template:
        return self.encoder.template

    @property
    def end_of_thought(self) -> int | None:
        """Return the id that ends reasoning, None where the tokenizer has no such token."""
        return self.encoder.control.get(END_THINK)

    @property
    def begins_with_thought(self) -> bool:
        """Return whether the prompt itself opens the reasoning, so that an answer begins inside of it."""
        return self.thinking and self.template.thinks != "text"

    def prompt(self, messages: Sequence[dict], tools: Sequence[dict] = ()) -> list[int]:
        """Return the ids that ask for the next answer. Raise ValueError for messages that cannot be asked with."""
        turns, schemas = read_messages(messages), read_tools(tools)
        if turns and turns[-1].role == "assistant":
            raise BadRow("no question", "the last message must be the user's or a tool's, for an answer to follow")
        Conversation((*turns, Turn("assistant", "an answer")), schemas).check()
        return self.encoder.prompt(Conversation(turns, schemas), self.thinking)

    def message(self, text: str) -> dict:
        """Return an answer as a message of the chat, its reasoning apart."""
        if self.begins_with_thought:
            reasoning, found, answer = text.partition(END_THINK)
            if not found:
                reasoning, answer = text, ""
        else:
            reasoning, answer = split_reasoning(text)
        reasoning = (reasoning or "").strip("\n")
        given = {"reasoning_content": reasoning} if reasoning.strip() else {}
        return {"role": "assistant", "content": answer.lstrip("\n") if reasoning else answer, **given}
