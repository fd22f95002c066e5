"""From the words of a command line to parsed arguments, with all that is wrong with the words."""

import os
import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_deepseek.arguments.argument_files import expand
from megatron_deepseek.arguments.megatron.architecture import DEFAULTS
from megatron_deepseek.arguments.megatron.translation import translate
from megatron_deepseek.launch.command_line import OneLineParser, options_of

_HELP = ("-h", "--help")


@dataclass(frozen=True)
class Words:
    """Parsed arguments; problems; lines for the start.

    Where something is missing, or could not be read and has its default, `args` are not `whole`: they can be checked,
    but do not make settings. `meant`: what unknown options were probably meant to be. `unread`: options whose values
    could not be read.
    """

    args: Namespace
    whole: bool = True
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    meant: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()

    def new(self, problems: Iterable[str]) -> list[str]:
        """Return those of further problems that are neither about an option which is only misspelt, nor about one whose
        value could not be read.
        """
        return [text for text in problems if not self._follows(text, set(re.findall(r"--[\w-]+", text)))]

    def _follows(self, text: str, named: set[str]) -> bool:
        missing = re.search("is missing|required", text) is not None
        return bool(self.unread & named) or (missing and bool(self.meant & named))


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
    unread = {each[0].split("=")[0] for each in options_of(line.argv) if each not in options_of(left)}
    words = Words(args, not (bad or others), (*line.problems, *bad), line.notes(), frozenset(meant), frozenset(unread))
    return replace(words, problems=(*words.problems, *words.new(others)))
