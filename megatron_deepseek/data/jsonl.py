"""Reading JSONL: one JSON object a line, plain or .gz, in bounded memory; every refusal names the file and the line."""

import glob
import gzip
import json
import os
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One line of a corpus, not parsed yet: `number` counts from 1 within `path`."""

    path: str
    number: int
    content: bytes

    def refuse(self, why: str) -> ValueError:
        return ValueError(f"{self.path} line {self.number}: {why}")


def find_inputs(patterns) -> list[str]:
    """The files that `patterns` (paths or globs) name, those of one glob sorted; ValueError where one names none."""
    found = []
    for pattern in patterns:
        paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not paths:
            raise ValueError(f"--input {pattern}: no such file")
        found.extend(paths)
    return found


def read_lines(path: str):
    """Each `Line` of a file that is not blank; a damaged .gz is refused where it breaks off."""
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            for number, content in enumerate(file, start=1):
                if content.strip():
                    yield Line(path, number, content)
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} cannot be read after line {number}: {error}") from error


def parse_texts(line: Line, keys) -> tuple[str | list[str], ...]:
    """The value of each of `keys`: a string, or a list of them where a document comes already split into sentences."""
    try:
        document = json.loads(line.content)
    except ValueError as error:
        raise line.refuse(f"malformed JSON: {error}") from error
    if not isinstance(document, dict):
        raise line.refuse(f"a JSON object is needed, this is a {type(document).__name__}")
    return tuple(_text_of(line, document, key) for key in keys)


def _text_of(line: Line, document: dict, key: str) -> str | list[str]:
    if key not in document:
        raise line.refuse(f"no key {key!r} (--json-keys); it has {', '.join(map(repr, document)) or 'none'}")
    value = document[key]
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, str):
            raise line.refuse(f"key {key!r} holds a value of type {type(part).__name__}, not text")
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise line.refuse(f"key {key!r} holds half a surrogate pair, which UTF-8 cannot encode: {error}") from error
    return value
