"""What V3 and R1 are told of tools: their own templates show none, so the system's text does.

The releases do not say how they were trained to be told. The words follow those with which vLLM and SGLang serve these
models (their tool_chat_template_deepseekr1.jinja), with the schema of each function as JSON in a fence.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_deepseek.finetuning.templates import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR

_INTRODUCTION = (
    "You are a helpful assistant with tool calling capabilities. When a tool call is needed, you MUST use the "
    f"following format to issue the call:\n{CALLS}{CALL}function{SEPARATOR}FUNCTION_NAME\n"
    f'```json\n{{"param1": "value1", "param2": "value2"}}\n```{END_CALL}{END_CALLS}\n\n'
    "Make sure the JSON is valid.\n\n## Tools\n\n### Function\n\nYou have the following functions available:\n\n")


def with_tools_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the tools at the end of the system's text: some templates show one such text alone."""
    schemas = "".join(f"\n```json\n{json.dumps(dict(each), ensure_ascii=False)}\n```\n" for each in tools)
    told = [dict(each) for each in messages]
    last = max((place for place, each in enumerate(told) if each["role"] == "system"), default=None)
    if last is None:
        return [{"role": "system", "content": _INTRODUCTION + schemas}, *told]
    told[last]["content"] += ("\n\n" if told[last]["content"] else "") + _INTRODUCTION + schemas
    return told
