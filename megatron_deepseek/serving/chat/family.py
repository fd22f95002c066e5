"""Messages to ids by the templates of the model families that fine-tuning has, for models without one of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.finetuning.conversation import BadRow, Conversation
from megatron_deepseek.finetuning.encode import Encoder
from megatron_deepseek.finetuning.templates import END_THINK, Piece, Rules, Template
from megatron_deepseek.serving.chat.fields import fault
from megatron_deepseek.serving.chat.messages import turns_of
from megatron_deepseek.serving.chat.options import ChatOptions
from megatron_deepseek.serving.chat.tools import Tools
from megatron_deepseek.serving.chat.tools_text import with_tools_text
from megatron_deepseek.serving.chat.written_tokens import WrittenTokens


class FamilyTemplate:
    """One family's template with a tokenizer. Raise ValueError where that lacks a token of the template."""

    def __init__(self, template: Template, tokenizer: Tokenizer, name: str):
        self.template, self.written = template, WrittenTokens(tokenizer)
        self.control = Encoder(tokenizer, template, Rules(), name).control

    @property
    def asks_for_thoughts(self) -> bool:
        """Return whether prompts open the reasoning unless a request says otherwise: R1's do."""
        return self.template.thinks == "lines"

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Tools, options: ChatOptions) -> list[int]:
        """Return the ids of a chat. Raise ValueError for what the template has no form for."""
        messages = self.written.mark(messages)
        if tools.shown and not self.template.shows_tools:
            messages = with_tools_text(messages, self.written.mark(tools.shown))
        conversation = Conversation(turns_of(messages), tuple(self.written.mark(tools.functions)))
        try:
            return self._encode(self._pieces(conversation, options))
        except BadRow as error:
            raise fault("messages", str(error)) from error

    def _pieces(self, conversation: Conversation, options: ChatOptions) -> list[Piece]:
        thinking = self.asks_for_thoughts if options.thinking is None else options.thinking
        if options.continues:
            return self._continued(conversation)
        if not options.asks:
            return self.template.render(conversation)
        if conversation.turns[-1].role == "assistant":
            raise fault("messages", "the last one is the assistant's: continue_final_message lets it go on")
        return self.template.prompt(conversation, thinking)

    def _continued(self, conversation: Conversation) -> list[Piece]:
        """Return the pieces up to where the last message breaks off: in its reasoning if it has no content yet."""
        *pieces, _ = self.template.render(conversation)
        last = conversation.turns[-1]
        if last.reasoning is None or last.content:
            return pieces
        if self.template.thinks == "text":
            text = pieces[-1].text.removesuffix(f"\n{END_THINK}\n\n")
            return [*pieces[:-1], pieces[-1]._replace(text=text)]
        end = max(place for place, piece in enumerate(pieces) if piece.control and piece.text == END_THINK)
        thought = pieces[end - 1].text
        return [*pieces[:end - 1], Piece(thought.removesuffix("\n") if self.template.thinks == "lines" else thought)]

    def _encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Return the ids of pieces; the text between two control tokens is encoded as one."""
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if not piece.control:
                text += piece.text
                continue
            if piece.text not in self.control:
                raise fault("messages", f"they need the token {piece.text}, which the model's tokenizer lacks")
            ids += [*self.written.encode(text), self.control[piece.text]]
            text = ""
        return ids + self.written.encode(text)


