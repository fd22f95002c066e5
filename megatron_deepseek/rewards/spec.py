"""What --reward says: which functions reward a completion, and how much each counts. No torch, nothing is imported.

    SPEC[:WEIGHT] with SPEC one of
      math                        a ready function (ready.py)
      math(answer=solution)       with options, separated by commas
      FILE.py:NAME                a function of a file
      model:DIR                   a reward model (--objective reward)
"""

import ast
import importlib.util
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_deepseek.near_names import near_names
from megatron_deepseek.packages import how_to_install
from megatron_deepseek.rewards.ready import READY, options_of

MODEL = "model"
_CALL = re.compile(r"(\w+)(?:\((.*)\))?", re.S)
_NEXT_OPTION = re.compile(r",(?=\s*\w+\s*=)")


@dataclass(frozen=True)
class RewardSpec:
    """A reward: `function` of the file `path`, or of READY where there is no path, or the model in a directory `path`.

    `name`: how its values are called; no two of a run are called alike. `weight`: what they are multiplied with in the
    sum; with 0 they are only reported. `options`: keywords of a ready function.
    """

    name: str
    function: str
    path: Path | None = None
    weight: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_model(self) -> bool:
        return self.path is not None and self.function == MODEL and self.path.suffix != ".py"

    @property
    def is_ready(self) -> bool:
        return self.path is None

    @property
    def sandboxed(self) -> bool:
        """Return whether the function needs no worker, since all that may hang or fail is in processes of its own."""
        return self.is_ready and READY[self.function].sandboxed

    def __str__(self) -> str:
        """Return it as --reward has it, without the weight."""
        options = f"({','.join(f'{name}={value}' for name, value in self.options)})" if self.options else ""
        if self.is_model:
            return f"{MODEL}:{self.path}"
        return f"{self.function}{options}" if self.is_ready else f"{self.path}:{self.function}"


def parse_rewards(texts: Sequence[str]) -> tuple[RewardSpec, ...]:
    """Return what the values of --reward say, in their order.

    Raise ValueError of one line for a file or function that is not there, an unknown name or option, a weight that is
    no finite number, a package that is missing, and for the same reward twice.
    """
    found: list[RewardSpec] = []
    for text in texts:
        spec = parse_reward(text)
        if str(spec) in map(str, found):
            raise ValueError(f"--reward {text}: {spec} is there twice")
        alike = sum(each.function == spec.function for each in found)
        found.append(replace(spec, name=f"{spec.name}_{alike + 1}") if alike else spec)
    return tuple(found)


def parse_reward(text: str) -> RewardSpec:
    """Return what one value of --reward says. Raise ValueError as `parse_rewards` does."""
    if text.startswith(MODEL + ":"):
        return _of_model(text)
    file, separator, rest = text.partition(".py:")
    if separator or text.endswith(".py"):
        return _of_file(text, Path(file.removesuffix(".py") + ".py"), rest)
    return _of_ready(text)


def _of_model(text: str) -> RewardSpec:
    path, _, last = text.removeprefix(MODEL + ":").rpartition(":")
    if path and not Path(text.removeprefix(MODEL + ":")).is_dir():
        spec = RewardSpec(MODEL, MODEL, Path(path), _weight(text, last))
    else:
        spec = RewardSpec(MODEL, MODEL, Path(text.removeprefix(MODEL + ":")))
    if not spec.path.is_dir():
        raise ValueError(f"--reward {text}: there is no directory {spec.path}")
    return spec


def _of_file(text: str, path: Path, rest: str) -> RewardSpec:
    name, separator, weight = rest.partition(":")
    if not name.isidentifier():
        raise ValueError(f"--reward {text}: behind the file stands the name of a function: {path}:NAME")
    defined = names_in(path, text)
    if defined and name not in defined:
        near = near_names(name, defined)
        raise ValueError(f"--reward {text}: {path} defines no {name}" + (f"; it has {', '.join(near)}" if near else ""))
    return RewardSpec(name, name, path.absolute(), _weight(text, weight) if separator else 1.0)


def names_in(path: Path, text: str) -> list[str]:
    """Return the names that a file gives its functions, imports and variables, none where it imports all of a module.

    Raise ValueError, for the --reward `text`, where it cannot be read or is no Python.
    """
    try:
        body = ast.parse(path.read_bytes(), str(path)).body
    except (OSError, ValueError, SyntaxError) as error:
        why = f"line {error.lineno} is no Python: {error.msg}" if isinstance(error, SyntaxError) else \
            getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--reward {text}: {path}: {why}") from error
    names = []
    for node in (each for top in body for each in ast.walk(top)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [each.asname or each.name for each in node.names]
    return [] if "*" in names else names


def _of_ready(text: str) -> RewardSpec:
    call, separator, weight = text.rpartition(":")
    call, separator, weight = (call, separator, weight) if separator and not weight.endswith(")") else (text, "", "")
    match = _CALL.fullmatch(call)
    name = match[1] if match else call
    if match is None or name not in READY:
        near = near_names(name, [*READY, MODEL], cutoff=0.6)
        raise ValueError(f"--reward {text}: {name} is none of {', '.join(READY)}, {MODEL}:DIR, and no FILE.py:NAME"
                         + (f"; did you mean {near[0]}?" if near else ""))
    options = _options(text, name, match[2])
    spec = RewardSpec(name, name, None, _weight(text, weight) if separator else 1.0, tuple(options.items()))
    package = READY[name].package
    if package is not None and importlib.util.find_spec(package[1]) is None:
        raise ValueError(f"--reward {text} needs {package[0]}: {how_to_install(package[0])}")
    try:
        READY[name].function([], [], [], **options)
    except ValueError as error:
        raise ValueError(f"--reward {text}: {error}") from error
    return spec


def _options(text: str, name: str, given: str | None) -> dict[str, Any]:
    known, found = options_of(name), {}
    for each in _NEXT_OPTION.split(given) if given and given.strip() else ():
        key, separator, value = (part.strip() for part in each.partition("="))
        if not separator or key not in known:
            raise ValueError(f"--reward {text}: {name} has no option {key!r}; it has {', '.join(known) or 'none'}")
        found[key] = _value(text, key, value, known[key].annotation)
    missing = [key for key, each in known.items() if each.default is inspect.Parameter.empty and key not in found]
    if missing:
        raise ValueError(f"--reward {text}: {name} needs {missing[0]}, as in {name}({missing[0]}=...)")
    return found


def _value(text: str, key: str, value: str, kind: type) -> Any:
    if kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return value if kind is str else {int: int, float: float}[kind](value)
    except (KeyError, ValueError):
        words = {bool: "neither true nor false", int: "no whole number", float: "no number"}[kind]
        raise ValueError(f"--reward {text}: {key} {value!r} is {words}") from None


def _weight(text: str, weight: str) -> float:
    try:
        found = float(weight)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"--reward {text}: the weight {weight!r} is no finite number")
    return found
