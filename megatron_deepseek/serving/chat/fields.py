"""Reads fields of a request: every fault is a ValueError that begins with its path, as in messages[2].content."""

from collections.abc import Mapping, Sequence
from typing import Any


def fault(path: str, what: str) -> ValueError:
    """Return the error of a field. A server gives `path` to the client as the parameter that is wrong."""
    return ValueError(f"{path}: {what}")


def text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise fault(path, f"must be a string, not {kind(value)}")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise fault(path, "holds half a surrogate pair, which is no character") from error
    return value


def flag(value: Any, path: str, default: bool | None) -> bool | None:
    """Return a truth value, and `default` for null."""
    if value is None:
        return default
    if not isinstance(value, bool):
        raise fault(path, f"must be true or false, not {kind(value)}")
    return value


def an_object(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise fault(path, f"must be an object, not {kind(value)}")
    return value


def a_list(value: Any, path: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise fault(path, f"must be a list, not {kind(value)}")
    return value


def one_of(value: Any, path: str, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise fault(path, f"{value!r:.80} is not one of {', '.join(choices)}")
    return value


def kind(value: Any) -> str:
    """Return JSON's word for what a value is."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "a string", int: "a number", float: "a number", list: "a list",
             dict: "an object"}
    return names.get(type(value), type(value).__name__)
