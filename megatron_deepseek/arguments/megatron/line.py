"""A command line as options with their values, while it is translated."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_deepseek.launch.command_line import is_option, options_of


@dataclass(frozen=True)
class Given:
    """An option as it was given: its name, its values, and the words of both. What stands before the first option has
    the name "".
    """

    name: str
    values: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return it as a user would type it."""
        return " ".join((self.name, *map(shlex.quote, self.values)))


def split(argv: Sequence[str]) -> list[Given]:
    """Return the options of a command line in their order."""
    return [_given(words) for words in options_of(argv)]


def _given(words: list[str]) -> Given:
    if not is_option(words[0]):
        return Given("", tuple(words), tuple(words))
    name, equals, value = words[0].partition("=")
    return Given(name, (value, *words[1:]) if equals else tuple(words[1:]), tuple(words))


@dataclass
class Line:
    """What is left of a command line (`options`), and what was said of the rest of it."""

    options: list[Given]
    ignored: list[str] = field(default_factory=list)
    read_as: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def value(self, name: str) -> str | None:
        """Return the values of an option, with blanks between; those given last, and None if it is not given."""
        return next((" ".join(each.values) for each in reversed(self.options) if each.name == name), None)

    def take(self, names: Sequence[str]) -> list[Given]:
        """Remove the options of these names and return them."""
        taken = [each for each in self.options if each.name in names]
        self.options = [each for each in self.options if each.name not in names]
        return taken

    def replace(self, names: Sequence[str], words: str) -> None:
        """Put the options in `words` in place of those of the given names, and say so."""
        before = " ".join(each.text for each in self.take(names))
        new = split(shlex.split(words))
        for each in new:
            self.put(each)
        if before:
            self.read_as.append(f"{before} as {' '.join(each.text for each in new) or 'nothing'}")

    def put(self, new: Given) -> None:
        """Add an option. One that is given already, with another value, is a problem."""
        other = self.value(new.name)
        if other is not None and other != " ".join(new.values):
            self.problems.append(f"{new.name} {other} conflicts with {new.text}, which another option stands for")
        elif other is None:
            self.options.append(new)

    def ignore(self, name: str) -> None:
        self.ignored += [each.name for each in self.take((name,))]

    def refuse(self, name: str, reason: str) -> None:
        self.problems += [f"{each.text}: {reason}" for each in self.take((name,))]
