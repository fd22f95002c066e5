"""What a reward function reads of a prompt, a completion and a row: the reasoning, the answer, and what it should be.

A prompt may have opened the reasoning (R1's ends with <think>), so that the completion begins inside of it.
"""

from collections.abc import Mapping
from typing import Any

THINK, END_THINK = "<think>", "</think>"
COLUMNS = ("answer", "solution")  # of a row, in which the right answer is looked for


def opened(prompt: str) -> str:
    """Return what of the reasoning's beginning the prompt ends with, with the line end behind it; "" where nothing."""
    place = prompt.rfind(THINK)
    return prompt[place:] if place >= 0 and not prompt[place + len(THINK):].strip() else ""


def split_answer(prompt: str, completion: str) -> tuple[str | None, str]:
    """Return the reasoning, None where there is none, and the answer behind it: "" while the reasoning has no end."""
    text = opened(prompt) + completion
    begin, end = text.find(THINK), text.rfind(END_THINK)
    if end >= 0:
        return text[begin + len(THINK) if 0 <= begin < end else 0:end].strip(), text[end + len(END_THINK):].strip()
    return (None, text.strip()) if begin < 0 else (text[begin + len(THINK):].strip(), "")


def answer_of(prompt: str, completion: str) -> str:
    """Return the answer of a completion, without its reasoning and without blanks around it."""
    return split_answer(prompt, completion)[1]


def right_answer(row: Mapping[str, Any], column: str = "") -> str | None:
    """Return the text that a row says to be right, None where it says none.

    It is that of `column`, or else of the first of COLUMNS that the row has, or else of the last message, if that is
    the assistant's.
    """
    for name in (column,) if column else COLUMNS:
        if row.get(name) is not None:
            return str(row[name]).strip()
    last = _last_message(row) if not column else None
    return None if last is None else answer_of("", last)


def _last_message(row: Mapping[str, Any]) -> str | None:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    said = last.get("content") if is_answer(last) else None
    return said if isinstance(said, str) else None


def is_answer(message: object) -> bool:
    """Return whether a message is the assistant's."""
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def asked_messages(row: Mapping[str, Any]) -> list | None:
    """Return the messages that a row asks with: its `messages` without an answer at their end, or a list in `prompt`.

    Return None for a row that has neither.
    """
    found = row.get("messages") or row.get("prompt")
    if not isinstance(found, list) or not found:
        return None
    return found[:-1] if is_answer(found[-1]) else found
