"""A recipe of LLaMA-Factory while it is translated: what is left of its keys, our arguments, and remarks."""

import math
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_EMPTY = (None, "", "none")
_LONGEST = 60  # characters of a value in a remark


@dataclass
class Recipe:
    """`given`: keys with their values, of which `left` are not translated yet. `arguments`: ours, by option.

    `options` are those that the entry has. `world`: the ranks that it is started with. Remarks: `left_out` on keys that
    nothing stands for, with the reason; `differs` on what is not the same here; `first` on what is to be done before.
    """

    given: Mapping[str, Any]
    options: Collection[str]
    world: int
    left: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.left = dict(self.given)

    def take(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or LLaMA-Factory's default, and strike the key off."""
        value = self.left.pop(key, default)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a number. Raise ValueError for anything else."""
        value = self.take(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))
                                  or not math.isfinite(value)):
            raise ValueError(f"{key}: {value} is no number")
        return value

    def integer(self, key: str, default: int | None = None) -> Any:
        """Return a whole number. Raise ValueError for anything else."""
        value = self.number(key, default)
        if value is not None and value != int(value):
            raise ValueError(f"{key}: {value} is no whole number")
        return None if value is None else int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value. Raise ValueError for anything else."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key}: {value} is neither true nor false")
        return value

    def text(self, key: str, default: str | None = None) -> Any:
        """Return a text; of a list, its entries with commas between."""
        value = self.take(key, default)
        if isinstance(value, list):
            return ",".join(map(str, value))
        return value if value is None else str(value)

    def names(self, key: str) -> list[str]:
        """Return the entries of a list, or of a text with commas between."""
        return [name.strip() for name in (self.text(key) or "").split(",") if name.strip()]

    def put(self, option: str, *values: Any) -> None:
        """Give one of our options."""
        assert option in self.options, option
        self.arguments[option] = [format(value, ".10g") if isinstance(value, float) else str(value)
                                  for value in values]

    def leave(self, key: str, value: Any, reason: str) -> None:
        """Say that nothing stands for a key, unless its value asks for nothing."""
        if value not in _EMPTY and value is not False and value != []:
            shown = "true" if value is True else str(value)
            self.left_out.append((f"{key}: {shown[:_LONGEST]}{'...' * (len(shown) > _LONGEST)}", reason))

    def words(self) -> Iterator[str]:
        """Yield our options with their values, an option in each text, as a shell reads them."""
        for option, values in self.arguments.items():
            yield " ".join((option, *(f'"{value}"' if value.startswith("$") else shlex.quote(value)
                                      for value in values)))
