"""Reads a Megatron user's command line: what is left are options of this project, with a word on all the others."""

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from megatron_deepseek.arguments.megatron.answers import by_name
from megatron_deepseek.arguments.megatron.ignored import IGNORED
from megatron_deepseek.arguments.megatron.joint import JOINT, JOINT_OPTIONS
from megatron_deepseek.arguments.megatron.line import Given, Line, split
from megatron_deepseek.arguments.megatron.refused import REFUSED
from megatron_deepseek.arguments.megatron.renamed import (
    NAMES,
    NOTHING,
    RELATIVES_IGNORED,
    RELATIVES_REFUSED,
    VALUES,
)


@dataclass(frozen=True)
class Translation:
    """A command line in this project's options (`argv`), what was not meant for it, and what is wrong.

    `ignored`: names of options. `read_as`: "--a 1 as --b 1". `problems`: one sentence for each.
    """

    argv: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    read_as: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def notes(self) -> tuple[str, ...]:
        """Return the lines for the start of a run."""
        ignored = f"ignored here: {' '.join(self.ignored)} (docs/megatron_arguments.md says why)"
        return ((f"read {', '.join(self.read_as)}",) if self.read_as else ()) + ((ignored,) if self.ignored else ())


def translate(argv: Sequence[str], known: Collection[str], unknown: Callable[[str], str]) -> Translation:
    """Translate a command line for a parser that knows the options `known`; `unknown` says what is told of others."""
    line = Line(split(argv))
    _rename(line, known)
    for function in JOINT:
        function(line)
    _answer(line, known, unknown)
    return Translation(tuple(word for each in line.options for word in each.words), tuple(dict.fromkeys(line.ignored)),
                       tuple(line.read_as), tuple(line.problems))


def _rename(line: Line, known: Collection[str]) -> None:
    given, line.options = line.options, []
    for each in given:
        key = each.name, " ".join(each.values)
        if key in NOTHING and each.name not in known:
            line.ignored.append(each.name)
        elif key in VALUES or (each.name in NAMES and each.name not in known):
            words = VALUES.get(key) or shlex.join((NAMES[each.name], *each.values))
            line.read_as.append(f"{each.text} as {words}")
            line.options += split(shlex.split(words))
        else:
            line.options.append(each)
    _conflicts(line, {NAMES[each.name] for each in given if each.name in NAMES})


def _conflicts(line: Line, names: set[str]) -> None:
    """Report options under two names that were given different values, which argparse would take the last of."""
    for name in sorted(names):
        different = dict.fromkeys(each.text for each in line.options if each.name == name)
        if len(different) > 1:
            line.problems.append(f"{' and '.join(different)} conflict: two names of one option")


def _answer(line: Line, known: Collection[str], unknown: Callable[[str], str]) -> None:
    """Take out of `line` what is no option of this project, by the tables."""
    ignored, refused = by_name(IGNORED, RELATIVES_IGNORED), by_name(REFUSED, RELATIVES_REFUSED)
    joint = {name for name, *_ in JOINT_OPTIONS}
    given, line.options = line.options, []
    for each in given:
        if each.name in known or each.name == "":
            line.options.append(each)
        elif each.name in ignored:
            wrong = ignored[each.name].miscounted(each.values)
            line.problems.append(wrong) if wrong else line.ignored.append(each.name)
        elif each.name in refused:
            _refuse(line, each, refused)
        else:
            line.problems.append(f"{each.text} is not understood" if each.name in joint else unknown(each.name))


def _refuse(line: Line, given: Given, refused) -> None:
    option = refused[given.name]
    if option.asks_for_nothing(given.values):
        line.ignored.append(given.name)
    else:
        line.problems.append(option.miscounted(given.values) or f"{given.text}: {option.reason}")
