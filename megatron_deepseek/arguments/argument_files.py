"""Arguments in files: @FILE, as a shell would read its text, and Megatron's --yaml-cfg FILE in the form of ModelZoo.

What stands on the command line wins over a file.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_deepseek.launch.command_line import options_of
from megatron_deepseek.packages import how_to_install

_YAML = "--yaml-cfg"
_SECTION, _ENVIRONMENT = "MODEL_ARGS", "ENV_VARS"
_DEEPEST = 8  # files inside files


def expand(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return `argv` with the arguments of its files in front of all others.

    Options that are given on the command line are left out of files. Raise ValueError, naming the file, for one that
    cannot be read.
    """
    own, read = _read(argv, environ, _DEEPEST)
    given = {words[0].split("=")[0] for words in options_of(own)}
    kept = [words for words in options_of(read) if words[0].split("=")[0] not in given]
    return [*(word for words in kept for word in words), *own]


def _read(argv: Sequence[str], environ: Mapping[str, str], depth: int) -> tuple[list[str], list[str]]:
    """Return the words that are no files, and those of the files."""
    own, read, words = [], [], iter(argv)
    for word in words:
        if word.startswith("@") and len(word) > 1:
            read += _flat(_text_words(word), environ, depth)
        elif word == _YAML or word.startswith(f"{_YAML}="):
            path = word.partition("=")[2] or next(words, "")
            read += _flat(_yaml_words(path, environ), environ, depth)
        else:
            own.append(word)
    return own, read


def _flat(words: list[str], environ: Mapping[str, str], depth: int) -> list[str]:
    if depth == 0:
        raise ValueError(f"files of arguments name each other more than {_DEEPEST} deep")
    own, read = _read(words, environ, depth - 1)
    return [*read, *own]


def _text_words(word: str) -> list[str]:
    try:
        return shlex.split(_text(word, Path(word[1:])), comments=True)
    except ValueError as error:
        raise ValueError(f"{word}: {error}") from error


def _text(what: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is no text: {error}") from error


def _yaml_words(path: str, environ: Mapping[str, str]) -> list[str]:
    """Return the arguments under MODEL_ARGS of a YAML file; every value is a text, as it is written there."""
    what = f"{_YAML} {path}"
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{what} needs PyYAML: {how_to_install('pyyaml')}") from None
    if not path:
        raise ValueError(f"{_YAML} needs a file")
    try:
        given = yaml.load(_text(what, Path(path)), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is no YAML: {' '.join(str(error).split())}") from error
    section = given.get(_SECTION) if isinstance(given, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{what} has no {_SECTION} with arguments, as files of Megatron-MoE ModelZoo have")
    return [word for name, value in section.items() for word in _words(what, name, value, environ)]


def _words(what: str, name: str, value, environ: Mapping[str, str]) -> list[str]:
    option = name if name.startswith("--") else "--" + name.replace("_", "-")
    if isinstance(value, dict):
        raise ValueError(f"{what}: {name} is a mapping; {_SECTION} holds options and values")
    if value in ("false", "False", "null", "~", ""):
        return []
    if value in ("true", "True"):
        return [option]
    if isinstance(value, list):
        return [option, *(_substituted(f"{what}: {name}", str(each), environ) for each in value)]
    return [option, *shlex.split(_substituted(f"{what}: {name}", value, environ))]


def _substituted(what: str, text: str, environ: Mapping[str, str]) -> str:
    """Return a text with the environment's values in place of ${NAME} and $NAME."""

    def value(match: re.Match) -> str:
        name = match[1] or match[2]
        if name not in environ:
            raise ValueError(f"{what} names {match[0]}, which the environment does not have")
        return environ[name]

    return re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", value, text)
