"""The parser of all commands: it answers a mistake with one line, which names the option that was probably meant."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TextIO

from megatron_deepseek.launch.ending import BROKEN_PIPE, silence
from megatron_deepseek.near_names import near_names

_NEAR = 0.75  # least similarity (difflib): --train-iter is near --train-iters, --tokenizer is near nothing
_MOST_PROPOSED = 3
# Other programs' names of options whose names here are spelt too differently to be found by their letters.
OTHER_NAMES = {
    "--tp": "--tensor-model-parallel-size", "--pp": "--pipeline-model-parallel-size",
    "--ep": "--expert-model-parallel-size", "--cp": "--context-parallel-size",
    "--etp": "--expert-tensor-parallel-size", "--learning-rate": "--lr", "--max-steps": "--train-iters",
    "--steps": "--train-iters", "--num-train-steps": "--train-iters", "--sequence-length": "--seq-length",
    "--max-seq-len": "--seq-length", "--resume": "--load", "--resume-from-checkpoint": "--load",
    "--checkpoint": "--load", "--output-dir": "--save"}


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors of one line, without the usage, and which takes no abbreviations.

    It reports an unknown option before a missing one, since the former is often the latter, misspelt.
    """

    def __init__(self, *args, allow_abbrev: bool = False, **more):
        super().__init__(*args, allow_abbrev=allow_abbrev, **more)

    def error(self, message: str):
        raise ValueError(self.in_words(message))

    @staticmethod
    def in_words(message: str) -> str:
        """Return argparse's message in the words of this project."""
        for kind, words in (("int", "whole number"), ("float", "number")):
            message = re.sub(f"invalid {kind} value: (.*)", rf"\1 is no {words}", message)
        return message.removeprefix("argument ")

    def print_help(self, file: TextIO | None = None):
        """Print the help."""
        self._write(self.format_help(), file)

    def exit_with(self, text: str):
        """Print `text` and leave with status 0, as --help does."""
        self._write(text)
        self.exit()

    def _write(self, text: str, file: TextIO | None = None):
        """Print `text`. If its reader has gone (`| head`), exit in silence: Python would end with an error."""
        file = file or sys.stdout
        try:
            file.write(text)
            file.flush()
        except BrokenPipeError:
            silence(file)
            self.exit(BROKEN_PIPE)

    def parse_args(self, args=None, namespace=None):
        arguments, left = self.parse_known_args(args, namespace)
        if left:
            self.error(f"unexpected {' '.join(map(repr, left))}" + self._commands())
        return arguments

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        if args is not None and self._subparsers is None:
            self._refuse_unknown(args)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        """Refuse the unknown options in `args`: words that begin with -- and have no blank, as for argparse."""
        end = list(args).index("--") if "--" in args else len(args)
        names = dict.fromkeys(arg.split("=")[0] for arg in args[:end] if is_option(arg))
        unknown = [name for name in names if name not in self._option_string_actions]
        if unknown:
            self.error("; ".join(map(self.describe_unknown, unknown)))

    def without_bad_values(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the options of `args` whose values can be read and go together, and what is wrong with the others."""
        left, problems = list(args), []
        while (wrong := self._bad_option(left)) is not None:
            words = options_of(left)
            kept = [each for each in words if each[0].split("=")[0] not in (wrong.argument_name or "").split("/")]
            if len(kept) == len(words):
                self.error(str(wrong))
            left = [word for each in kept for word in each]
            problems.append(self.in_words(str(wrong)))
        return left, problems

    def _bad_option(self, args: Sequence[str]) -> argparse.ArgumentError | None:
        self.exit_on_error = False
        try:
            super().parse_known_args(args)
        except argparse.ArgumentError as error:
            return error if error.argument_name else None
        except ValueError:  # what is missing, which parse_partly says
            pass
        finally:
            self.exit_on_error = True
        return None

    def parse_partly(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the arguments of `args`, whose values are right, and what is wrong beside: missing, or unexpected."""
        arguments = argparse.Namespace()
        try:
            return self.parse_args(args, arguments), []
        except ValueError as error:
            return arguments, [str(error)]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(self._option_string_actions)

    def meant(self, name: str) -> list[str]:
        """Return the options that a user who typed the unknown option `name` may have meant."""
        return proposals(name, [option for option, action in self._option_string_actions.items()
                                if option.startswith("--") and action.help is not argparse.SUPPRESS])

    def describe_unknown(self, name: str) -> str:
        """Return what a user who typed the option `name` is told."""
        near = self.meant(name)
        return f"{name} is no option" + (f"; did you mean {' or '.join(near)}?" if near else "; --help lists them all")

    def _commands(self) -> str:
        return "" if self._subparsers is None else "; each command has its own --help"


def is_option(word: str) -> bool:
    """Return whether `word` begins an option, as for argparse: two dashes and no blank."""
    return word.startswith("--") and " " not in word


def options_of(args: Sequence[str]) -> list[list[str]]:
    """Return the words of each option with its values; those before the first option are a group too."""
    groups: list[list[str]] = [[]]
    for word in args:
        if is_option(word):
            groups.append([word])
        else:
            groups[-1].append(word)
    return [words for words in groups if words]


def proposals(name: str, options: Sequence[str]) -> list[str]:
    """Return those of `options` that a user who typed `name` may have meant, the likeliest first, three at most."""
    name = "--" + re.sub(r"[_-]+", "-", name.lower()).strip("-")
    if name in options:
        return [name]
    if OTHER_NAMES.get(name) in options:
        return [OTHER_NAMES[name]]
    near = near_names(name, options, _NEAR, _MOST_PROPOSED)
    holding = [option for option in options if f"{name[1:]}-" in f"{option}-" and option not in near]
    return (near + holding)[:_MOST_PROPOSED]
