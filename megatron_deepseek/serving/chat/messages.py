"""The messages of a chat request, checked and brought to one form, in which templates read them.

A message of that form has role (system, user, assistant or tool) and content, a text; an assistant's may have
reasoning_content and tool_calls, whose arguments are the text that the model wrote; a tool's may have tool_call_id.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_deepseek.finetuning.conversation import ToolCall, Turn
from megatron_deepseek.finetuning.messages import split_reasoning
from megatron_deepseek.serving.chat.fields import a_list, an_object, fault, flag, kind, one_of, text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "function": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "reasoning")  # the names that servers give it; DeepSeek's first


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a request. Raise ValueError that names the field which is wrong."""
    if body.get("messages") is None:
        raise fault("messages", "is missing")
    found = a_list(body["messages"], "messages")
    if not found:
        raise fault("messages", "is empty: there must be a message to answer")
    messages = [_message(an_object(each, f"messages[{place}]"), f"messages[{place}]")
                for place, each in enumerate(found)]
    return _in_order(messages)


def _message(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    role = ROLES[one_of(given.get("role"), f"{path}.role", tuple(ROLES))]
    message: dict[str, Any] = {"role": role}
    calls = _calls(given.get("tool_calls"), f"{path}.tool_calls")
    if role == "assistant":
        reasoning = _reasoning(given, path)
        message |= {"reasoning_content": reasoning} if reasoning is not None else {}
        message |= {"tool_calls": calls} if calls else {}
        if flag(given.get("prefix"), f"{path}.prefix", False):
            message["prefix"] = True
    elif calls:
        raise fault(f"{path}.tool_calls", f"only the assistant calls tools, and the role is {role}")
    message["content"] = _content(given.get("content"), f"{path}.content", may_be_none=role == "assistant")
    for name in ("name", "tool_call_id"):
        if given.get(name) is not None:
            message[name] = text(given[name], f"{path}.{name}")
    return message


def _content(content: Any, path: str, may_be_none: bool) -> str:
    """Return a text, or the texts of a list of parts, each on lines of its own."""
    if content is None and may_be_none:
        return ""
    if isinstance(content, str):
        return text(content, path)
    if not isinstance(content, list | tuple):
        raise fault(path, f"must be a string or a list of parts, not {kind(content)}")
    texts = []
    for place, part in enumerate(content):
        where = f"{path}[{place}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else an_object(part, where)
        if part.get("type") not in _TEXT_PARTS:
            raise fault(f"{where}.type", f"{part.get('type')!r:.80} cannot be read: this model reads text alone")
        texts.append(text(part.get("text"), f"{where}.text"))
    return "\n".join(texts)


def _reasoning(given: Mapping[str, Any], path: str) -> str | None:
    """Return what the assistant thought, by either name; null and an empty text are none."""
    for name in _REASONING:
        if given.get(name):
            return text(given[name], f"{path}.{name}")
    return None


def _calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    return [_call(an_object(each, f"{path}[{place}]"), f"{path}[{place}]")
            for place, each in enumerate(a_list(calls, path))]


def _call(call: Mapping[str, Any], path: str) -> dict[str, Any]:
    one_of(call.get("type") or "function", f"{path}.type", ("function",))
    function = an_object(call.get("function"), f"{path}.function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(an_object(arguments or {}, f"{path}.function.arguments"), ensure_ascii=False)
    identity = {"id": text(call["id"], f"{path}.id")} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {
        "name": text(function.get("name"), f"{path}.function.name"),
        "arguments": text(arguments, f"{path}.function.arguments")}}


def _in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the results of tools in the order of their calls: templates show no ids.

    Raise ValueError for a result without its call.
    """
    ordered: list[dict[str, Any]] = []
    waiting: list[str | None] = []
    results: list[tuple[int, dict[str, Any]]] = []
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            results.append((_number_of(message, waiting, place), message))
            continue
        ordered += [result for _, result in sorted(results, key=lambda each: each[0])]
        results = []
        ordered.append(message)
        if message["role"] != "system":
            waiting = [call.get("id") for call in message.get("tool_calls", ())]
    return ordered + [result for _, result in sorted(results, key=lambda each: each[0])]


def _number_of(message: Mapping[str, Any], waiting: Sequence[str | None], place: int) -> int:
    """Return which of the calls before it a tool's message answers; without an id, the place keeps its order."""
    if not waiting:
        raise fault(f"messages[{place}].role", "a tool's result must follow an assistant's message with tool_calls")
    identity = message.get("tool_call_id")
    if identity is None or None in waiting:
        return place
    if identity not in waiting:
        raise fault(f"messages[{place}].tool_call_id", f"{identity!r:.80} is the id of no call before it")
    return waiting.index(identity)


def turns_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Return messages as the turns that the families' own templates are rendered from."""
    return tuple(_turn(message) for message in messages)


def _turn(message: Mapping[str, Any]) -> Turn:
    content, reasoning = message["content"], message.get("reasoning_content")
    if message["role"] != "assistant":
        return Turn(message["role"], content)
    if reasoning is None:
        reasoning, content = split_reasoning(content)
    calls = (ToolCall(call["function"]["name"], call["function"]["arguments"])
             for call in message.get("tool_calls", ()))
    return Turn("assistant", content, reasoning, tuple(calls))
