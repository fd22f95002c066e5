"""From the words of a command line to parsed arguments, with all that is wrong with the words."""

import os
import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_deepseek.arguments.argument_files import expand
from megatron_deepseek.arguments.megatron.architecture import DEFAULTS
from megatron_deepseek.arguments.megatron.translation import translate
from megatron_deepseek.launch.command_line import OneLineParser

_HELP = ("-h", "--help")


@dataclass(frozen=True)
class Words:
    """Parsed arguments; problems; lines for the start.

    `args` is None where values could not be read, so that a further look would complain of defaults. Where something is
    missing they are not `whole`: they can be checked, but do not make settings. `meant`: what unknown options were
    probably meant to be.
    """

    args: Namespace | None
    whole: bool = True
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    meant: frozenset[str] = frozenset()

    def new(self, problems: Iterable[str]) -> list[str]:
        """Return those of further problems that are not about an option which is only misspelt."""
        return [text for text in problems if not (self.meant & set(re.findall(r"--[\w-]+", text))
                                                  and re.search("is missing|required", text))]


def read_words(argv: Sequence[str], parser: OneLineParser) -> Words:
    """Parse a command line that may have options of Megatron-LM. Without --model Megatron-LM's defaults hold."""
    if any(word in _HELP for word in argv):
        parser.parse_args(list(argv))
    meant: list[str] = []

    def unknown(name: str) -> str:
        meant.extend(parser.meant(name))
        return parser.describe_unknown(name)

    line = translate(expand(argv, os.environ), parser.options, unknown)
    if "--recipe" not in parser.options and not any(word.split("=")[0] == "--model" for word in line.argv):
        parser.set_defaults(**DEFAULTS)
    left, bad = parser.without_bad_values(line.argv)
    args, others = parser.parse_partly(left)
    words = Words(None if bad else args, not others, (*line.problems, *bad), line.notes(), frozenset(meant))
    return words if bad else replace(words, problems=(*words.problems, *words.new(others)))
