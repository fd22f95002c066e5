"""The grammars of tool calls: of answers that must be calls (tool_choice "required", or a named function), and of calls
whose arguments must follow their schemas ("strict": true).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_deepseek.finetuning.templates import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR
from megatron_deepseek.inference.grammar import Grammar, need_library
from megatron_deepseek.serving.chat.calls import FENCED
from megatron_deepseek.serving.chat.parser import AnswerForm
from megatron_deepseek.serving.chat.response_format import grammar, json_rule
from megatron_deepseek.serving.chat.tools import Tools

_PATH = "tool_choice"


def forced_calls(tools: Tools, form: AnswerForm, begins_after: int | None, leading: bool) -> Grammar:
    """Return the grammar of one call, or where calls may be parallel of more, whose arguments follow the schemas.

    Raise ValueError where the library for grammars is missing.
    """
    need_library(_PATH)
    rules, calls = _calls(tools, form, [True] * len(tools.functions))
    return grammar(rules, f"<[{form.control[CALLS]}]> {calls}", _PATH, begins_after, leading)


def strict_calls(tools: Tools, form: AnswerForm) -> Grammar | None:
    """Return the grammar of what follows once the model begins to call, where a tool is strict; else None.

    Arguments of strict tools follow their schemas, those of others are objects.
    """
    strict = [bool(function.get("strict")) for function in tools.functions]
    if not any(strict):
        return None
    path = f"tools[{strict.index(True)}].function"
    need_library(path)
    rules, calls = _calls(tools, form, strict)
    return replace(grammar(rules, calls, path, form.control[CALLS], leading=False), must_begin=False)


def _calls(tools: Tools, form: AnswerForm, strict: Sequence[bool]) -> tuple[list[dict[str, Any]], str]:
    """Return the rules of arguments, and in Lark what is behind the token that begins calls."""
    token = {name: f"<[{identity}]>" for name, identity in form.control.items()}
    rules, calls = [], []
    for place, function in enumerate(tools.functions):
        schema = _parameters(function) if strict[place] else {"type": "object"}
        rules.append({"name": f"arguments{place}", **json_rule(schema)})
        calls.append(_call(function["name"], f"@arguments{place}", token, form.calls == FENCED))
    one = f"({' | '.join(calls)})"
    between = r'"\n" ' if form.calls == FENCED else ""
    more = f" ({between}{one})*" if tools.parallel else ""
    return rules, f"{one}{more} {token[END_CALLS]}"


def _call(name: str, arguments: str, token: Mapping[str, str], fenced: bool) -> str:
    """Return one call in Lark."""
    if fenced:
        opening = json.dumps(f"{name}\n```json\n")
        return rf'{token[CALL]} "function" {token[SEPARATOR]} {opening} {arguments} "\n```" {token[END_CALL]}'
    return f"{token[CALL]} {json.dumps(name)} {token[SEPARATOR]} {arguments} {token[END_CALL]}"


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a function's arguments, which are an object whatever it says."""
    return {"type": "object", **(function.get("parameters") or {})}
