"""Lists of messages, as OpenAI, ShareGPT and ms-swift write them, to turns; tool calls, tools and loss weights."""

import json
import math
from collections.abc import Mapping

from megatron_deepseek.finetuning.conversation import BadRow, ToolCall, Turn

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
         "observation": "tool", "tool_response": "tool", "function_response": "tool", "function": "tool",
         "function_call": "call", "tool_call": "call"}
BEGIN, END = "<think>", "</think>"


def read_messages(messages) -> tuple[Turn, ...]:
    """Return the turns of a list of messages. Raise BadRow where one cannot be used."""
    if isinstance(messages, str):
        messages = _json(messages, "the messages")
    if not isinstance(messages, list | tuple):
        raise BadRow("wrong type", f"the messages must be a list, this is a {type(messages).__name__}")
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise BadRow("wrong type", f"message {number} must be an object, this is a {type(message).__name__}")
        turn = _turn(message, number)
        if _is_call(turn) and turns and _is_call(turns[-1]) and _role(message, number) == "call":
            turns[-1] = Turn("assistant", turns[-1].content, turns[-1].reasoning, turns[-1].calls + turn.calls,
                             turns[-1].weight)  # parallel calls, each a message of its own
        else:
            turns.append(turn)
    return tuple(turns)


def _is_call(turn: Turn) -> bool:
    return turn.role == "assistant" and bool(turn.calls)


def _role(message: Mapping, number: int) -> str:
    name = message.get("role", message.get("from"))
    if name is None:
        raise BadRow("missing field", f"message {number} has no role")
    if not isinstance(name, str) or name not in ROLES:
        raise BadRow("unknown role", f"message {number} has the role {name!r}, which is none of {', '.join(ROLES)}")
    return ROLES[name]


def _turn(message: Mapping, number: int) -> Turn:
    role, where = _role(message, number), f"message {number}"
    calls = _calls(message.get("tool_calls"), where)
    content = message.get("content", message.get("value"))
    if content is None and not calls:
        raise BadRow("missing field", f"{where} has no content")
    if role == "call":
        return Turn("assistant", "", None, _calls(content, where), _weight(message, where))
    content = text_of("" if content is None else content, where)
    if role != "assistant":
        return Turn(role, content, _reasoning(message, where), calls)
    inline, content = split_reasoning(content)
    given = _reasoning(message, where)
    if given is not None and inline is not None:
        raise BadRow("reasoning twice", f"{where} has reasoning_content and a {BEGIN} in its content; remove one")
    if given is not None:
        inline, content = given, content.lstrip("\n")  # layout, as behind an inline </think>
    return Turn("assistant", content, inline, calls, _weight(message, where))


def split_reasoning(content: str) -> tuple[str | None, str]:
    """Return (reasoning or None, answer) of a content that may begin with <think>...</think>.

    The line ends about the two tags are layout, and no part of either.
    """
    start = content.lstrip()
    if not start.startswith(BEGIN) or END not in start:
        return None, content
    reasoning, _, answer = start[len(BEGIN):].partition(END)
    return reasoning.strip("\n") if reasoning.strip() else None, answer.lstrip("\n")


def _reasoning(message: Mapping, where: str) -> str | None:
    given = message.get("reasoning_content")
    given = message.get("reasoning") if given is None else given
    if given is None or given == "":
        return None
    text = text_of(given, where)
    return text.strip("\n") if text.strip() else None


def text_of(content, where: str) -> str:
    """Return a text, or the texts of OpenAI's list of parts. Raise BadRow for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise BadRow("wrong type", f"{where} must hold text, not a value of the type {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise BadRow("images or sound", f"{where} holds a part of the type {kind!r:.40}, which these models cannot "
                                            "read; remove the row")
        texts.append(part.get("text") if isinstance(part, Mapping) else part)
    if not all(isinstance(text, str) for text in texts):
        raise BadRow("wrong type", f"{where} has a part without text")
    return "".join(texts)


def _weight(message: Mapping, where: str) -> float:
    """Return the loss weight: of `loss` (true, false, or a number), `loss_scale` or OpenAI's `weight`; else 1."""
    value = next((message[key] for key in ("loss", "loss_scale", "weight") if message.get(key) is not None), True)
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
        raise BadRow("wrong loss", f"{where} has the loss {value!r}; it must be true, false, or a weight of at least 0")
    return float(value)


def _json(text: str, what: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow("malformed JSON", f"{what} must be JSON: {error}") from error


def _calls(calls, where: str) -> tuple[ToolCall, ...]:
    """Return the tool calls of OpenAI's list, or of ShareGPT's JSON text with name and arguments."""
    if calls is None:
        return ()
    if isinstance(calls, str):
        calls = _json(calls, f"{where}: the tool call")
    return tuple(_call(each, where) for each in _listed(calls, f"{where}: tool_calls"))


def _listed(value, what: str) -> list | tuple:
    """Return a list, or the list of one object. Raise BadRow for anything else."""
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list | tuple):
        raise BadRow("wrong type", f"{what} must be a list, not a value of the type {type(value).__name__}")
    return value


def _call(call, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("missing field", f"{where} has a tool call without a function's name")
    arguments = function.get("arguments", function.get("parameters", "{}"))
    return ToolCall(function["name"], arguments if isinstance(arguments, str) else
                    json.dumps(arguments, ensure_ascii=False))


def read_tools(tools) -> tuple[dict, ...]:
    """Return the schemas of a row's tools: OpenAI's list, functions without the wrapping, or either as JSON text."""
    if not tools:
        return ()
    tools = _json(tools, "the tools") if isinstance(tools, str) else tools
    schemas = []
    for tool in _listed(tools, "the tools"):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("missing field", "the tools have one without a function's name")
        schemas.append(dict(function))
    return tuple(schemas)
