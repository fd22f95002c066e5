"""Reads what llamafactory-cli reads: a YAML or JSON file with key=value behind it, or a command line of --key value."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.packages import how_to_install

_ENDS = (".yaml", ".yml", ".json")
_PROGRAMS = ("llamafactory-cli", "lmf")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def read_words(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys that `words` give, and the variables that they set for the environment.

    `words` are a file and key=value, or a whole command line: VARIABLE=value llamafactory-cli train, and then a file or
    --key value. Raise ValueError for what llamafactory-cli would not read either.
    """
    words, environment = list(words), {}
    while words and (match := _ASSIGNMENT.fullmatch(words[0])) and any(word in _PROGRAMS for word in words):
        environment[match[1]] = match[2]
        del words[0]
    if words and words[0] in _PROGRAMS:
        command = words[1:2]
        if command != ["train"]:
            raise ValueError(f"{words[0]} {' '.join(command)}: only llamafactory-cli train is translated; "
                             "tools/merge_lora.py is for export, tools/chat.py for chat")
        del words[:2]
    if not words:
        raise ValueError("there is nothing to translate: give a file, or -- and a command line")
    if words[0].endswith(_ENDS):
        return {**_read_file(Path(words[0])), **dict(map(_assignment, words[1:]))}, environment
    return _options(words), environment


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return {key: _read_again(value) for key, value in read_object(path).fields.items()}
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{path} needs PyYAML: {how_to_install('pyyaml')}") from None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no keys with values")
    return {str(key): _read_again(value) for key, value in found.items()}


def _assignment(word: str) -> tuple[str, Any]:
    match = _ASSIGNMENT.fullmatch(word)
    if match is None:
        raise ValueError(f"{word} is not key=value, which alone may stand behind a file")
    return match[1], _value(match[2])


def _options(words: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].replace("-", "_").partition("=")
            given[name] = _value(value) if equals else True
        elif name is None:
            raise ValueError(f"{word} is neither a YAML or JSON file nor an option")
        else:
            given[name] = _value(word) if given[name] is True else f"{given[name]} {word}"
    return given


def _read_again(value: Any) -> Any:
    """Return a number that is written as a text: PyYAML, other than OmegaConf, takes 1e-4 for one."""
    return _value(value) if isinstance(value, str) else value


def _value(text: str) -> Any:
    """Return the value of a word as YAML has it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("null", "none", "~", ""):
        return None
    if _NUMBER.fullmatch(text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    return text


def processes(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return the processes on a node and the nodes that llamafactory-cli's variables ask for; None where none does."""
    def number(name: str) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else None

    return number("NPROC_PER_NODE"), number("NNODES")
