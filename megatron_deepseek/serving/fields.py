"""Reads a request's fields, each of the type that it must have. A null is as good as an absent field, as for OpenAI."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.near_names import near_names
from megatron_deepseek.serving.errors import ApiError, bad_field

_NEAR = 0.8  # of a misspelt field; a client's field that is no field here is mostly less alike
_KINDS = {bool: "true or false", str: "a text", list: "a list", dict: "an object", int: "an integer"}


@dataclass(frozen=True)
class Fields:
    """The fields of a request or of an object in it; `path` is put before their names."""

    values: Mapping[str, Any]
    path: str = ""

    def given(self, name: str) -> Any:
        """Return the value as it is; None where it is absent or null."""
        return self.values.get(name)

    def boolean(self, name: str, default: bool = False) -> bool:
        return self._typed(name, bool, default)

    def text(self, name: str, default: str | None = None) -> str | None:
        return self._typed(name, str, default)

    def listed(self, name: str) -> list | None:
        return self._typed(name, list, None)

    def object(self, name: str) -> "Fields":
        """Return the object of this name, without fields where it is absent."""
        return Fields(self._typed(name, dict, {}), f"{self.path}{name}.")

    def integer(self, name: str, default: int | None = None, least: int | None = None, most: int | None = None
                ) -> int | None:
        """Return an integer within its bounds."""
        value = self._typed(name, int, default)
        if value is None:
            return value
        for bound, word, wrong in ((least, "least", least is not None and value < least),
                                   (most, "most", most is not None and value > most)):
            if wrong:
                raise self.fault(name, f"is {value}; it must be at {word} {bound}")
        return value

    def fault(self, name: str, what: str) -> ApiError:
        """Return the error of a field: its path, and what is wrong with it."""
        return bad_field(self.path + name, f"{self.path}{name} {what}")

    def refuse_misspelt(self, known: Iterable[str]) -> None:
        """Raise ApiError for a field that is unknown and spelt nearly like a known one.

        Clients send many fields that do not change an answer, so that other unknown ones are let be.
        """
        known = set(known)
        for name in self.values:
            near = near_names(name, known, cutoff=_NEAR, most=1) if name not in known else []
            if near:
                raise self.fault(name, f"is no field of this request; did you mean {near[0]}?")

    def _typed(self, name: str, kind: type, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fault(name, f"is {shortly(value)}, not {_KINDS[kind]}")
        return value


def shortly(value: Any) -> str:
    """Return a value as JSON, cut where it is long; of lists and objects what they are alone."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."
