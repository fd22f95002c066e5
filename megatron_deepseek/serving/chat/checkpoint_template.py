"""Messages to ids by the Jinja template of a checkpoint: the ids of transformers' apply_chat_template.

The templates that exports of this project carry (checkpoint/convert/chat_templates.py) have no forms for tools, and
show no reasoning that is to go on: there the family's own template serves, whose ids are the same for all else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.checkpoint.convert.chat_templates import read_template, template_names
from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.finetuning.templates import TEMPLATES
from megatron_deepseek.serving.chat.family import FamilyTemplate
from megatron_deepseek.serving.chat.jinja import JinjaTemplate, own_template, template_of
from megatron_deepseek.serving.chat.options import ChatOptions
from megatron_deepseek.serving.chat.tools import Tools
from megatron_deepseek.serving.chat.tools_text import with_tools_text
from megatron_deepseek.serving.chat.written_tokens import WrittenTokens


@dataclass(frozen=True, eq=False)
class CheckpointTemplate:
    """A template with a tokenizer; `with_tools` is the one for requests with tools, where there are two.

    `family`: what shows tools in place of a template that was exported by this project.
    """

    name: str
    written: WrittenTokens
    plain: JinjaTemplate
    with_tools: JinjaTemplate
    family: FamilyTemplate | None = None

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
        exported = next((name for name in template_names() if read_template(name) == plain.source), None)
        family = None if exported is None else FamilyTemplate(TEMPLATES[exported], tokenizer, str(folder))
        name = str(file) if file else "the checkpoint's template"
        return cls(name, WrittenTokens(tokenizer), plain, with_tools, family)

    @property
    def source(self) -> str:
        return self.with_tools.source

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Tools, options: ChatOptions) -> list[int]:
        """Return the ids of a chat. Raise ValueError for what the template refuses."""
        if self.family is not None and (tools.shown or _beyond_exports(messages, options)):
            return self.family.render(messages, tools, options)
        template = self.with_tools if tools.shown else self.plain
        messages, shown = self.written.mark(messages), self.written.mark(tools.shown)
        if shown and not template.shows_tools:
            messages, shown = with_tools_text(messages, shown), ()
        arguments = dict(self.written.mark(options.arguments))
        if options.thinking is not None:
            arguments |= {"thinking": options.thinking, "enable_thinking": options.thinking}
        return self.written.encode(template.render(messages, shown, asks=options.asks, continues=options.continues,
                                                   arguments=arguments))


def _beyond_exports(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> bool:
    """Return whether messages have what an exported template has no form for."""
    goes_on = options.continues and messages[-1].get("reasoning_content") is not None
    return goes_on or any(each["role"] == "tool" or each.get("tool_calls") for each in messages)
