"""Rows of the files that people have, to a Conversation: each format is recognised by its keys.

  messages        OpenAI, ScienceOne (content with <think> or reasoning_content, loss), ms-swift (loss_scale, tools)
  conversations   ShareGPT: from and value, with function_call and observation
  instruction     Alpaca: input, output, history, system
  prompt          prompt and completion: texts, or lists of messages of which only the completion is trained
  query           ms-swift: query, response, history, system

The names of LLaMA-Factory's dataset_info.json are changed to these first (dataset_info.py).
"""

from collections.abc import Mapping

from megatron_deepseek.finetuning.conversation import BadRow, Conversation, Turn
from megatron_deepseek.finetuning.messages import read_messages, read_tools, text_of

FORMS = ("messages", "conversations", "instruction", "prompt", "query")
ANSWERS = {"instruction": ("output", "response"), "prompt": ("completion", "response"), "query": ("response",)}
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def to_conversation(row) -> Conversation:
    """Return the conversation of a row. Raise BadRow for one that cannot be used."""
    if not isinstance(row, Mapping):
        raise BadRow("not an object", f"a row must be an object with messages, this is a {type(row).__name__}")
    form = _form_of(row)
    media = next((key for key in MEDIA if row.get(key)), None)
    if media is not None:
        raise BadRow("images or sound", f"the key {media} holds images or sound, which these models cannot read; "
                                        "remove the row")
    turns = _READERS[form](row)
    return Conversation((*_system(row, turns), *turns), read_tools(row.get("tools"))).check()


def _system(row: Mapping, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turn of the key `system`, unless the messages begin with the same text. Raise BadRow for another."""
    if not row.get("system"):
        return ()
    turn = Turn("system", text_of(row["system"], "system"))
    if turns and turns[0].role == "system":
        if turns[0] != turn:
            raise BadRow("two system texts", "the row has a key system, and another text in a message of the role "
                                             "system; remove one of them")
        return ()
    return (turn,)


def _form_of(row: Mapping) -> str:
    """Return the key among FORMS that tells the format. Raise BadRow where there is none, or more than one."""
    found = [key for key in FORMS if row.get(key) is not None]
    if {"messages", "conversations"} <= set(found):
        raise BadRow("two conversations", "the row has both messages and conversations; remove one of them")
    if not found:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise BadRow("unknown format", f"the row has none of the keys {', '.join(FORMS)}; it has {keys}")
    return found[0]


def _answered(row: Mapping, form: str):
    """Return the answer of a row with one question. Raise BadRow where it is missing."""
    for key in ANSWERS[form]:
        if row.get(key) is not None:
            return row[key]
    raise BadRow("missing field", f"the row has {form} but no {' or '.join(ANSWERS[form])}")


def _history(row: Mapping) -> list[dict]:
    """Return the messages of `history`, a list of [question, answer]."""
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2
                                                        for pair in history):
        raise BadRow("history is not pairs", "history must be a list of [question, answer]")
    return [message for pair in history for message in _exchange(*pair)]


def _exchange(question, answer) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca(row: Mapping) -> tuple[Turn, ...]:
    question, more = text_of(row["instruction"], "instruction"), text_of(row.get("input") or "", "input")
    question = f"{question}\n{more}" if question and more else question or more
    return read_messages([*_history(row), *_exchange(question, _answered(row, "instruction"))])


def _prompt(row: Mapping) -> tuple[Turn, ...]:
    prompt, completion = row["prompt"], _answered(row, "prompt")
    if isinstance(prompt, str) and isinstance(completion, str):
        return read_messages([*_history(row), *_exchange(prompt, completion)])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list | tuple) or not isinstance(completion, list | tuple):
        raise BadRow("wrong type", "prompt and completion must be texts or lists of messages")
    given = [{**each, "loss": False} if isinstance(each, Mapping) else each for each in prompt]
    return read_messages([*given, *completion])


def _query(row: Mapping) -> tuple[Turn, ...]:
    return read_messages([*_history(row), *_exchange(row["query"], _answered(row, "query"))])


_READERS = {"messages": lambda row: read_messages(row["messages"]),
            "conversations": lambda row: read_messages(row["conversations"]),
            "instruction": _alpaca, "prompt": _prompt, "query": _query}
