"""LLaMA-Factory's dataset_info.json: entries that say where a dataset lies and how its columns are called."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_deepseek.finetuning.conversation import BadRow
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.near_names import near_names

FILE = "dataset_info.json"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}


@dataclass(frozen=True)
class Entry:
    """The file of an entry, and what its rows must be changed to before formats.py reads them. `ranking`: its rows are
    pairs of a chosen and a rejected answer.
    """

    file: Path
    formatting: str = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    ranking: bool = False

    def change(self, row):
        """Return a row with the names that formats.py knows. Raise BadRow where a column is missing."""
        if not isinstance(row, Mapping):
            return row
        return self._sharegpt(row) if self.formatting == "sharegpt" else self._alpaca(row)

    def _alpaca(self, row: Mapping) -> dict:
        names = {**ALPACA, **self.columns}
        return {ours: row.get(names[theirs]) for theirs, ours in ALPACA.items()} | {
            "tools": row.get(self.columns["tools"]) if "tools" in self.columns else None} | self._preference(row)

    def _preference(self, row: Mapping) -> dict:
        """Return the columns of preference data: both answers of a ranking, and the label of KTO."""
        names = ("chosen", "rejected") if self.ranking else ()
        found = {name: row.get(self.columns.get(name, name)) for name in names}
        return found | ({"kto_tag": row.get(self.columns["kto_tag"])} if "kto_tag" in self.columns else {})

    def _sharegpt(self, row: Mapping) -> dict:
        column, tags = self.columns.get("messages", "conversations"), {**TAGS, **self.tags}
        if row.get(column) is None:
            raise BadRow("missing field", f"the row has no column {column}, which {FILE} names as its messages")
        roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system",
                 tags["observation_tag"]: "tool", tags["function_tag"]: "function_call"}
        messages = [self._message(each, tags, roles) for each in row[column]]
        more = {key: row.get(self.columns[key]) for key in ("system", "tools") if key in self.columns}
        answers = {name: self._message(answer, tags, roles) if name in ("chosen", "rejected") else answer
                   for name, answer in self._preference(row).items()}
        return {"messages": messages, **more, **answers}

    def _message(self, message, tags: Mapping[str, str], roles: Mapping[str, str]):
        if not isinstance(message, Mapping):
            return message
        rest = {key: value for key, value in message.items() if key not in (tags["role_tag"], tags["content_tag"])}
        role = message.get(tags["role_tag"])
        return {**rest, "role": roles.get(role, role), "content": message.get(tags["content_tag"])}


@functools.lru_cache
def _entries(path: str) -> dict:
    return dict(read_object(path).fields)


def find_entry(named: str, option: str) -> Entry | None:
    """Return the entry that `.../dataset_info.json:name` names, None for what is no such name.

    Raise ValueError where there is none, and for one that is on a hub: nothing is downloaded here.
    """
    path, colon, name = named.rpartition(":")
    if named.endswith(FILE):
        raise ValueError(f"{option} {named}: name the entry as well, {named}:NAME with one of "
                         f"{', '.join(list(_entries(named))[:8])}")
    if not colon or not path.endswith(FILE):
        return None
    entries = _entries(path)
    if name not in entries:
        there = near_names(name, entries) or list(entries)[:8]
        raise ValueError(f"{option} {named}: there is no entry {name}; there are {', '.join(there)}")
    entry = entries[name]
    if "file_name" not in entry:
        raise ValueError(f"{option} {named}: the entry has no file_name; download the dataset and name its file there")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise ValueError(f"{option} {named}: the formatting {formatting} is not one of alpaca, sharegpt")
    return Entry(Path(path).parent / entry["file_name"], formatting, entry.get("columns", {}), entry.get("tags", {}),
                 bool(entry.get("ranking")))
