"""A careful reader of JSON that others wrote, or that a disk has damaged: each fault is one line, with the file's name.

Python's reader takes a file of any size, goes as deep as it can (100,000 brackets end it in a RecursionError), keeps
the last of two equal keys, accepts NaN, and leaves the check of types to its callers. Here a file is read only if its
size is plausible, it nests at most `DEEPEST` levels, has each key once and only numbers that JSON knows; `JsonObject`
returns values of the type that is asked for. Every fault is a ValueError of one line.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 1 << 24  # bytes of a file, unless the reader says more: parsed, they can take fifty times as many
LARGEST_LIST = 100_000_000  # of one with an entry for each tensor or file; the limit of safetensors for its header
DEEPEST = 128  # objects and lists inside each other
LARGEST_INTEGER = 2**63 - 1
_READ_BYTES = 1 << 20

_STRING = re.compile(rb'"[^"]*"?')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE = bytes.maketrans(b"[]{}", b"()()")
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_REQUIRED: Any = object()


def read_json(path: str | os.PathLike, largest: int = LARGEST) -> Any:
    """Return the value in a JSON file. Raise ValueError if it is unreadable, larger than `largest` or malformed."""
    try:
        with open(path, "rb") as file:
            content, size = bytearray(), os.fstat(file.fileno()).st_size
            while size <= largest and (more := file.read(_READ_BYTES)):  # a pipe's size is 0 whatever comes out of it
                content += more
                size = max(size, len(content))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if size > largest:
        raise ValueError(f"{path} has {size:,} bytes, more than the {largest:,} that are read of such a file")
    return parse_json(bytes(content), path)


def parse_json(content: bytes, where: object) -> Any:
    """Return the value of `content`. Raise ValueError, begun by `where`, unless it is JSON as described above."""
    if _is_too_deep(content):
        raise ValueError(f"{where} is malformed JSON: nested more than {DEEPEST} deep")
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse_constant,
                           parse_float=_finite)
        if _HALF_PAIR.search(content):  # of surrogates: such a text can be neither printed nor written
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except ValueError as error:
        raise ValueError(f"{where} is malformed JSON: {error}") from error


def _is_too_deep(content: bytes) -> bool:
    """Return whether brackets nest deeper than `DEEPEST`, without recursion and in time linear in the length.

    Strings and all else that is no bracket are removed. Then each removal of all innermost pairs takes a level away,
    for half the levels; the rest is nested at most as deep as it has opening brackets.
    """
    rest = content.replace(rb"\\", b"").replace(rb"\"", b"")
    rest = _STRING.sub(b"", rest).translate(_ALIKE, _NO_BRACKETS)
    for _ in range(DEEPEST // 2):
        before, rest = len(rest), rest.replace(b"()", b"")
        if len(rest) == before:
            break
    return rest.count(b"(") > DEEPEST // 2


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{_short(twice)} is in an object twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is larger than any number")
    return number


def _short(value: Any) -> str:
    """Return `value` as JSON in one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, (dict, list)) else \
        f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(frozen=True)
class JsonObject:
    """A JSON object of a file, or inside another one. `where` names the place, and begins every message.

    The methods that return one value take a `default` for a key that is absent; without it the key is required. A null
    is refused unless it is the default.
    """

    fields: Mapping[str, Any]
    where: str

    @classmethod
    def of(cls, value: Any, where: object) -> "JsonObject":
        """Return `value` as a JsonObject. Raise ValueError unless it is an object."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} holds {_short(value)}, not an object")
        return cls(value, str(where))

    def integer(self, key: str, least: int = 0, most: int = LARGEST_INTEGER, default: Any = _REQUIRED) -> Any:
        """Return an integer from `least` to `most`. 2.0 is refused."""
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fault(key, "not an integer")
        return self._within(key, value, least, most)

    def number(self, key: str, least: float = -math.inf, most: float = math.inf, default: Any = _REQUIRED) -> Any:
        """Return a number from `least` to `most`, as a float."""
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.fault(key, "not a number")
        if abs(value) > 1e308:  # an integer can be larger than any float
            raise self.fault(key, "too large a number")
        return float(self._within(key, value, least, most))

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._typed(key, str, "a text", default)

    def boolean(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._typed(key, bool, "true or false", default)

    def list(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._typed(key, list, "a list", default)

    def integers(self, key: str, least: int = 0, most: int = LARGEST_INTEGER) -> tuple[int, ...]:
        """Return a list of integers, each from `least` to `most`."""
        values = self.list(key)
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{self.where}: {_short(key)} has {_short(value)} in it, not an integer of at least "
                                 f"{least}" + (f" and at most {most}" if most < LARGEST_INTEGER else ""))
        return tuple(values)

    def object(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return an object as a JsonObject; its messages name the keys that lead to it."""
        value = self._typed(key, dict, "an object", default)
        return value if value is default else JsonObject(value, f"{self.where}: in {_short(key)}")

    def only(self, *known: str) -> None:
        """Raise ValueError if there is any other key."""
        unknown = sorted(set(self.fields) - set(known))
        if unknown:
            raise ValueError(f"{self.where} has {_short(unknown[0])}, which is not one of {', '.join(known)}")

    def fault(self, key: str, reason: str) -> ValueError:
        """Return the error for a value: FILE: "key" is VALUE, `reason`."""
        return ValueError(f"{self.where}: {_short(key)} is {_short(self.fields[key])}, {reason}")

    def _value(self, key: str, default: Any) -> Any:
        if key in self.fields:
            return self.fields[key]
        if default is _REQUIRED:
            raise ValueError(f"{self.where} has no {_short(key)}")
        return default

    def _typed(self, key: str, kind: type, name: str, default: Any) -> Any:
        value = self._value(key, default)
        if value is not default and not isinstance(value, kind):
            raise self.fault(key, f"not {name}")
        return value

    def _within(self, key: str, value: Any, least: float, most: float) -> Any:
        if value < least:
            raise self.fault(key, f"less than {least}")
        if value > most:
            raise self.fault(key, f"more than {most}")
        return value


def read_object(path: str | os.PathLike, largest: int = LARGEST) -> JsonObject:
    """Return the object in a JSON file; raise ValueError as `read_json` does, or where it is no object."""
    return JsonObject.of(read_json(path, largest), path)
