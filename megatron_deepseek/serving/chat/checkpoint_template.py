"""Messages to ids by the Jinja template of a checkpoint: the ids of transformers' apply_chat_template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.serving.chat.jinja import JinjaTemplate, own_template, template_of
from megatron_deepseek.serving.chat.options import ChatOptions
from megatron_deepseek.serving.chat.tools import Tools
from megatron_deepseek.serving.chat.tools_text import with_tools_text
from megatron_deepseek.serving.chat.written_tokens import WrittenTokens


@dataclass(frozen=True, eq=False)
class CheckpointTemplate:
    """A template with a tokenizer; `with_tools` is the one for requests with tools, where there are two."""

    name: str
    written: WrittenTokens
    plain: JinjaTemplate
    with_tools: JinjaTemplate

    @classmethod
    def find(cls, tokenizer: Tokenizer, folder: Path | None, file: Path | None = None) -> "CheckpointTemplate | None":
        """Return the template in `file`, or that of the tokenizer in `folder`; None where neither is.

        Raise ValueError for one that is no Jinja.
        """
        if file is not None:
            plain = with_tools = template_of(file, folder or file.parent)
        elif folder is not None:
            plain, with_tools = own_template(folder), own_template(folder, with_tools=True)
        else:
            return None
        if plain is None:
            return None
        return cls(str(file) if file else "the checkpoint's template", WrittenTokens(tokenizer), plain, with_tools)

    @property
    def source(self) -> str:
        return self.with_tools.source

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Tools, options: ChatOptions) -> list[int]:
        """Return the ids of a chat. Raise ValueError for what the template refuses."""
        template = self.with_tools if tools.shown else self.plain
        messages, shown = self.written.mark(messages), self.written.mark(tools.shown)
        if shown and not template.shows_tools:
            messages, shown = with_tools_text(messages, shown), ()
        arguments = dict(self.written.mark(options.arguments))
        if options.thinking is not None:
            arguments |= {"thinking": options.thinking, "enable_thinking": options.thinking}
        return self.written.encode(template.render(messages, shown, asks=options.asks, continues=options.continues,
                                                   arguments=arguments))
