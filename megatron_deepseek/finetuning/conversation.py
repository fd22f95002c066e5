"""One conversation, whatever file it came from: turns with a role, text, reasoning, tool calls and a loss weight.

Every format (formats.py) becomes this, and every template (templates.py) is rendered from this. So the same
conversation has the same tokens in every format, and no template is ever parsed.
"""

import json
from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


class BadRow(ValueError):
    """A row that cannot be used. `reason` is counted; the message says what is wrong with this one, and what to do."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; `arguments` is the JSON text as the model is to write it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """One message. `reasoning`, `calls` and `weight`, the factor of its tokens in the loss, are an assistant's.

    `reasoning` is without <think> and the line ends around it; None where the model answered at once.
    """

    role: str
    content: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the JSON schemas of the tools that the model could call: objects with name, description
    and parameters.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict, ...] = ()

    @property
    def last_user(self) -> int:
        """Return the index of the last user's turn, -1 if there is none. What comes before it is history."""
        return max((index for index, turn in enumerate(self.turns) if turn.role == "user"), default=-1)

    def check(self) -> "Conversation":
        """Return the conversation. Raise BadRow unless its turns can be those of a chat that ends in an answer."""
        before, calling = None, False
        for number, turn in enumerate(self.turns, 1):
            _check_order(turn.role, before, calling, number)
            _check_turn(turn, number)
            if turn.role != "system":
                before = turn.role
                calling = bool(turn.calls) or calling and turn.role == "tool"
        _check_characters(json.dumps(self.tools, ensure_ascii=False), "the schema of a tool")
        if before != "assistant":
            raise BadRow("no answer at the end",
                         "there are no messages" if before is None else
                         f"the last message is of the role {before}; remove it, or add the assistant's answer")
        return self


@dataclass(frozen=True)
class Group:
    """The conversations that a row of a file becomes; they are kept or dropped together, and stay neighbours.

    An ordinary row is one conversation, a pair of preference tuning two: chosen, rejected. `values` has a number for
    each, none where the objective needs none: 1 or -1 for KTO's labels, a pair's margin for a reward model.
    """

    conversations: tuple[Conversation, ...]
    values: tuple[float, ...] = ()


def _check_order(role: str, before: str | None, calling: bool, number: int):
    """Raise BadRow for a role that cannot follow `before`, the role of the last message that is no system's."""
    allowed = {None: ("user",), "user": ("assistant",), "tool": ("tool", "assistant"),
               "assistant": ("user", "tool") if calling else ("user",)}[before]
    if role == "tool" and not calling:
        raise BadRow("tool result without a call", f"message {number} is a tool's result, but the assistant has called "
                                                   "no tool; add tool_calls to the assistant's message before it")
    if role == "user" and calling and before == "assistant":
        raise BadRow("call without a tool's result", f"message {number} is the user's, but the tool calls before it "
                                                     "have no results; add messages of the role tool")
    if role != "system" and role not in allowed:
        after = "at the beginning" if before is None else f"after the role {before}"
        raise BadRow("roles out of order", f"message {number} has the role {role} {after}, where only "
                                           f"{' or '.join(allowed)} can stand; merge or remove messages")


def _check_turn(turn: Turn, number: int):
    if not turn.content.strip() and not turn.calls and turn.role in ("user", "assistant"):
        raise BadRow("empty message", f"message {number} ({turn.role}) is empty; remove the row or fill it")
    if turn.role != "assistant" and (turn.calls or turn.reasoning is not None):
        raise BadRow("reasoning or calls of another role", f"message {number} ({turn.role}) has reasoning or tool "
                                                           "calls, which only the assistant can have")
    calls = (part for call in turn.calls for part in (call.name, call.arguments))
    for text in (turn.content, turn.reasoning or "", *calls):
        _check_characters(text, f"message {number}")


def _check_characters(text: str, where: str):
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("half a surrogate pair", f"{where} holds half a surrogate pair, which UTF-8 cannot encode; write "
                                              "the character whole") from error
