"""Rows of preference data, to the conversations of a pair, or to one that is labelled good or bad.

  chosen, rejected        TRL: beside prompt (texts or messages), or with the prompt as their common beginning;
                          LLaMA-Factory: beside instruction, query, conversations or messages
  rejected_response       ms-swift: beside messages, whose last answer is the chosen one
  rejected_messages       ms-swift: beside messages, both whole conversations
  label, kto_tag          TRL and ms-swift, LLaMA-Factory: beside any form of formats.py, true for a good answer

Each side is read as the row of formats.py that it would be by itself. Loss is on what the sides do not have in common:
in a pair on all answers behind the messages that both begin with, in a labelled row on what follows the last question.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import replace

from megatron_deepseek.finetuning.conversation import BadRow, Conversation, Group
from megatron_deepseek.finetuning.formats import to_conversation

SIDES = ("chosen", "rejected")
LABELS = ("label", "kto_tag")
GOOD, BAD = 1.0, -1.0
_ANSWER_KEYS = {"instruction": "output", "prompt": "completion", "query": "response"}
_OTHERS = (*SIDES, *LABELS, "rejected_response", "rejected_messages", "margin", "output", "completion", "response")


def to_pair(row) -> Group:
    """Return the chosen and the rejected conversation of a row, with the margin between them, 0 where none is given.

    Raise BadRow for a row that is no pair, or whose sides are equal.
    """
    chosen, rejected = (to_conversation(each) for each in _sides(_mapping(row)))
    common = _common_turns(chosen, rejected)
    if chosen == rejected:
        raise BadRow("equal pair", "chosen and rejected are the same; remove the row")
    if not any(turn.role == "user" for turn in chosen.turns[:common]):
        raise BadRow("no common prompt", "chosen and rejected do not begin with the same question; a pair is two "
                                         "answers to one prompt")
    return Group((_trained_from(chosen, common), _trained_from(rejected, common)), (_margin(row), 0.0))


def to_labelled(row) -> Group:
    """Return the conversation of a row with GOOD or BAD for its label; of a pair, chosen as GOOD and rejected as BAD.

    Raise BadRow for a row without a label.
    """
    key = next((key for key in LABELS if _mapping(row).get(key) is not None), None)
    if key is None and _is_pair(row):
        return replace(to_pair(row), values=(GOOD, BAD))
    if key is None:
        raise BadRow("no label", f"the row has no {' or '.join(LABELS)}, which says whether its answer is good; it has "
                                 f"{_keys(row)}")
    conversation = to_conversation({name: value for name, value in row.items() if name not in LABELS})
    label = _truth(row[key], key)
    return Group((_trained_from(conversation, conversation.last_user + 1),), (GOOD if label else BAD,))


def _mapping(row) -> Mapping:
    if not isinstance(row, Mapping):
        raise BadRow("not an object", f"a row must be an object, this is a {type(row).__name__}")
    return row


def _keys(row: Mapping) -> str:
    return ", ".join(map(repr, list(row)[:8])) or "none"


def _is_pair(row: Mapping) -> bool:
    return any(row.get(key) is not None for key in ("rejected", "rejected_response", "rejected_messages"))


def _sides(row: Mapping) -> tuple[dict, dict]:
    """Return the rows that chosen and rejected are by themselves."""
    rest = {key: value for key, value in row.items() if key not in _OTHERS and value is not None}
    if row.get("rejected_messages") is not None or row.get("rejected_response") is not None:
        return _swift(row, rest)
    missing = next((side for side in SIDES if row.get(side) in (None, "", [])), None)
    if missing is not None:
        raise BadRow(f"no {missing}", f"the row has no {missing} answer; it has {_keys(row)}")
    if _holds_prompt(row):
        return _implicit(row, {key: value for key, value in rest.items() if key != "prompt"})
    return _answered(rest, row["chosen"]), _answered(rest, row["rejected"])


def _swift(row: Mapping, rest: dict) -> tuple[dict, dict]:
    messages = row.get("messages")
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRow("missing field", "rejected_response and rejected_messages stand beside messages, which the row "
                                      "does not have")
    rejected = row.get("rejected_messages")
    if rejected is None and not isinstance(row["rejected_response"], str):
        raise BadRow("wrong type", "rejected_response must be a text; write a row for each of several")
    if rejected is None:
        rejected = [*messages[:-1], _message(row["rejected_response"])]
    return {**rest, "messages": messages}, {**rest, "messages": rejected}


def _holds_prompt(row: Mapping) -> bool:
    """Return whether chosen and rejected begin with the prompt: none is given in the same form, as TRL has it."""
    forms = [key for key in ("messages", "conversations", "instruction", "query") if row.get(key) is not None]
    return not forms and (row.get("prompt") is None or _is_list(row["chosen"]) and not _is_list(row["prompt"]))


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)


def _implicit(row: Mapping, rest: dict) -> tuple[dict, dict]:
    chosen, rejected = row["chosen"], row["rejected"]
    if _is_list(chosen) and _is_list(rejected):
        return {**rest, "messages": chosen}, {**rest, "messages": rejected}
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise BadRow("wrong type", "chosen and rejected must both be texts, or both lists of messages")
    begun = os.path.commonprefix([chosen, rejected])
    prompt = begun[:begun.rfind(" ") + 1] if " " in begun else ""
    if not prompt.strip():
        raise BadRow("no common prompt", "chosen and rejected are texts that do not begin alike; give a key prompt, or "
                                         "lists of messages")
    return tuple({**rest, "prompt": prompt.rstrip(" "), "completion": side[len(prompt):]}
                 for side in (chosen, rejected))


def _answered(rest: dict, answer) -> dict:
    """Return a row with the answer in the place where its form has one."""
    listed = next((key for key in ("messages", "conversations") if key in rest), None)
    if listed is not None:
        more = list(answer) if _is_list(answer) else [_message(answer)]
        return {**rest, listed: [*rest[listed], *more] if _is_list(rest[listed]) else rest[listed]}
    form = next((key for key in _ANSWER_KEYS if key in rest), None)
    if form is None:
        raise BadRow("unknown format", f"the row has no prompt in a known form; it has {_keys(rest)}")
    if form != "prompt" and isinstance(answer, Mapping):
        answer = answer.get("content", answer.get("value"))
    elif isinstance(answer, Mapping):
        answer = [answer]
    return {**rest, _ANSWER_KEYS[form]: answer}


def _message(answer) -> Mapping:
    return answer if isinstance(answer, Mapping) else {"role": "assistant", "content": answer}


def _common_turns(one: Conversation, other: Conversation) -> int:
    """Return with how many equal turns both begin."""
    return next((place for place, (a, b) in enumerate(zip(one.turns, other.turns)) if a != b),
                min(len(one.turns), len(other.turns)))


def _trained_from(conversation: Conversation, first: int) -> Conversation:
    """Return the conversation without loss before the turn `first`."""
    turns = tuple(replace(turn, weight=0.0) if place < first and turn.role == "assistant" else turn
                  for place, turn in enumerate(conversation.turns))
    return replace(conversation, turns=turns)


def _margin(row: Mapping) -> float:
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise BadRow("wrong margin", f"margin {margin!r:.40} is no number")
    return float(margin)


def _truth(value, key: str) -> bool:
    """Return a label's truth value: true or false, 1 or 0, or these as texts."""
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    found = known.get(str(value).lower())
    if found is None:
        raise BadRow("wrong label", f"{key} {value!r:.40} is neither true nor false")
    return found
