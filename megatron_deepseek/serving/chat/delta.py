"""What a streamed answer is made of: pieces of text, of reasoning, and of tool calls."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallDelta:
    """A piece of a tool call: `index` counts the answer's calls; the first piece has `id` and `name`."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None

    @classmethod
    def begin(cls, index: int, name: str) -> "CallDelta":
        """Return the first piece of a call, with an id that no other has."""
        return cls(index, id=f"call_{secrets.token_hex(12)}", name=name)

    def fields(self) -> dict[str, Any]:
        begun = {"id": self.id, "type": "function"} if self.id is not None else {}
        name = {"name": self.name} if self.name is not None else {}
        return {"index": self.index, **begun, "function": {**name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ChatDelta:
    """What an answer grows by: exactly one of the three."""

    content: str | None = None
    reasoning: str | None = None
    call: CallDelta | None = None

    def __post_init__(self):
        assert sum(each is not None for each in (self.content, self.reasoning, self.call)) == 1

    def fields(self) -> dict[str, Any]:
        """Return the delta as OpenAI's clients read it; reasoning by DeepSeek's name."""
        if self.call is not None:
            return {"tool_calls": [self.call.fields()]}
        return {"content": self.content} if self.content is not None else {"reasoning_content": self.reasoning}


def joined(deltas: Iterable[ChatDelta]) -> list[ChatDelta]:
    """Return the deltas with neighbours of one kind as one."""
    together: list[ChatDelta] = []
    for delta in deltas:
        last = together[-1] if together else None
        if last is not None and delta.content is not None and last.content is not None:
            together[-1] = ChatDelta(content=last.content + delta.content)
        elif last is not None and delta.reasoning is not None and last.reasoning is not None:
            together[-1] = ChatDelta(reasoning=last.reasoning + delta.reasoning)
        elif (last is not None and delta.call is not None and last.call is not None
              and delta.call.index == last.call.index and delta.call.id is None):
            call = CallDelta(last.call.index, last.call.arguments + delta.call.arguments, last.call.id, last.call.name)
            together[-1] = ChatDelta(call=call)
        else:
            together.append(delta)
    return together


def message_of(deltas: Iterable[ChatDelta]) -> dict[str, Any]:
    """Return the deltas of a whole answer as the message of a response; its content is None where there is none."""
    content, reasoning, calls = "", "", {}
    for delta in deltas:
        if delta.call is not None:
            begun = calls.setdefault(delta.call.index, {"id": delta.call.id, "type": "function", "function": {
                "name": delta.call.name, "arguments": ""}})
            begun["function"]["arguments"] += delta.call.arguments
        content, reasoning = content + (delta.content or ""), reasoning + (delta.reasoning or "")
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls or reasoning else "")}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls.values())
    return message
