"""The grammar of answers that must be tool calls: tool_choice "required", or a named function."""

import json
from collections.abc import Mapping
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
    token = {name: f"<[{identity}]>" for name, identity in form.control.items()}
    rules, calls = [], []
    for place, function in enumerate(tools.functions):
        rules.append({"name": f"arguments{place}", **json_rule(_parameters(function))})
        calls.append(_call(function["name"], f"@arguments{place}", token, form.calls == FENCED))
    one = f"({' | '.join(calls)})"
    between = r'"\n" ' if form.calls == FENCED else ""
    more = f" ({between}{one})*" if tools.parallel else ""
    return grammar(rules, f"{token[CALLS]} {one}{more} {token[END_CALLS]}", _PATH, begins_after, leading)


def _call(name: str, arguments: str, token: Mapping[str, str], fenced: bool) -> str:
    """Return one call in Lark."""
    if fenced:
        opening = json.dumps(f"{name}\n```json\n")
        return rf'{token[CALL]} "function" {token[SEPARATOR]} {opening} {arguments} "\n```" {token[END_CALL]}'
    return f"{token[CALL]} {json.dumps(name)} {token[SEPARATOR]} {arguments} {token[END_CALL]}"


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a function's arguments, which are an object whatever it says."""
    return {"type": "object", **(function.get("parameters") or {})}
