"""The chat template of a checkpoint, in Jinja: rendered in a sandbox, with what transformers gives to templates.

A template is a program from whoever made the checkpoint. The sandbox keeps it from Python's internals and from changing
what it is given; it sees plain JSON values alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.serving.chat.fields import fault

_CONTINUED = "\ue0f2"  # private use: marks the end of the message that is to go on
_AS_OBJECTS = re.compile(r"""arguments['"\]]*\s*\|\s*tojson""")
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which templates say what is trained: its body, as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller) -> str:
        return caller()


def _raise(message: str):
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class JinjaTemplate:
    """A template and the texts of its special tokens. Raise ValueError, begun by `where`, for one that is no Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str):
        self.source, self.special_tokens = source, dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form),
                                "dict": lambda *args, **fields: dict(*args, **fields)}  # without the class's methods
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise ValueError(f"{where}, line {error.lineno}, is no chat template: {error.message}") from error

    @property
    def shows_tools(self) -> bool:
        return "tools" in self.variables

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *,
               asks: bool, continues: bool, arguments: Mapping[str, Any]) -> str:
        """Return the text of a chat: with what `asks` for an answer, or up to the end of a message that `continues`.

        `arguments` are further variables of the template. Raise ValueError for what the template refuses.
        """
        seen = [self._message(message) for message in messages]
        if continues:
            last = seen[-1]
            field = "content" if last.get("content") or not last.get("reasoning_content") else "reasoning_content"
            last[field] = (last.get(field) or "") + _CONTINUED
        variables = {"documents": None, **self.special_tokens, **arguments}
        try:
            text = self._template.render({**variables, "messages": seen, "tools": list(tools) or None,
                                          "add_generation_prompt": asks})
        except (jinja2.exceptions.TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise fault("messages", f"the model's chat template cannot show them: {error}") from error
        if not continues:
            return text
        if _CONTINUED not in text:
            raise fault("continue_final_message", "the model's chat template leaves out parts of the last message")
        return text[:text.rindex(_CONTINUED)]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message in the form that this template reads: reasoning by its names in use, arguments of calls as
        objects where it writes them as JSON itself, and no content beside calls where it asks whether that is none.
        """
        seen = dict(message)
        reasoning = seen.get("reasoning_content")
        if reasoning is not None:
            seen |= {"reasoning": reasoning, "thinking": reasoning}
        if seen.get("tool_calls"):
            if not seen["content"] and re.search(r"is (not )?none", self.source):
                seen["content"] = None
            if _AS_OBJECTS.search(self.source) and "is string" not in self.source:
                seen["tool_calls"] = [_with_object(call) for call in seen["tool_calls"]]
        return seen


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments parsed; those that are no JSON stay a text."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def own_template(folder: Path, with_tools: bool = False) -> JinjaTemplate | None:
    """Return the template beside a tokenizer.json, None where there is none: chat_template.jinja, or chat_template of
    tokenizer_config.json, which may be a list, of which "tool_use" is for requests with tools.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return template_of(file, folder)
    found = read_object(config).fields.get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("tool_use" if with_tools and "tool_use" in named else "default")
    return JinjaTemplate(found, special_tokens(folder), str(config)) if isinstance(found, str) else None


def template_of(file: Path, folder: Path) -> JinjaTemplate:
    """Return the template in a file, with the special tokens of the tokenizer in `folder`."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return JinjaTemplate(source, special_tokens(folder), str(file))


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of the special tokens that tokenizer_config.json names."""
    config = folder / "tokenizer_config.json"
    fields = read_object(config).fields if config.is_file() else {}
    found = {name: fields[name].get("content") if isinstance(fields[name], dict) else fields[name]
             for name in _TOKENS if fields.get(name) is not None}
    return {name: text for name, text in found.items() if isinstance(text, str)}
