"""The command line of tools/make_conversations.py, which makes chats without a download: puzzles with reasoning.

Every row is a question, the thoughts that lead to the answer, and the answer, in OpenAI's messages. A question is
either in the training set or held out, never in both, so an answer to a held-out one was not memorised. The same
arguments give the same bytes.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.data.preprocess.files import refuse_directory, written_aside
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

PROGRAM = "make_conversations.py"
LETTERS = "abcdefghij"
HELD_OUT_PART = 10  # one of so many questions is held out

Puzzle = tuple[str, str, str]  # question, thoughts, answer


def _sum(chance: random.Random) -> Puzzle:
    one, other = chance.randint(0, 9), chance.randint(0, 9)
    return f"What is {one} plus {other} ?", f"{one} plus {other} is {one + other}", str(one + other)


def _next(chance: random.Random) -> Puzzle:
    first = chance.randint(0, 90)
    told = " , ".join(str(first + step) for step in range(3))
    return f"Which number follows {told} ?", f"{first + 2} plus 1 is {first + 3}", str(first + 3)


def _word(chance: random.Random) -> str:
    return " ".join(chance.choice(LETTERS) for _ in range(chance.randint(3, 4)))


def _reverse(chance: random.Random) -> Puzzle:
    word = _word(chance)
    backwards = " ".join(reversed(word.split()))
    return f"Reverse {word} .", f"the letters are {word} and the last one is first", backwards


def _first(chance: random.Random) -> Puzzle:
    word = _word(chance)
    return f"What is the first letter of {word} ?", f"the letters are {word}", word.split()[0]


def _last(chance: random.Random) -> Puzzle:
    word = _word(chance)
    return f"What is the last letter of {word} ?", f"the letters are {word}", word.split()[-1]


KINDS: tuple[Callable[[random.Random], Puzzle], ...] = (_sum, _next, _reverse, _first, _last)


def puzzles(seed: int, held_out: bool) -> Iterator[Puzzle]:
    """Yield puzzles without end, of all kinds in turn, either those that are held out or the others."""
    chance = random.Random(seed)
    while True:
        for kind in KINDS:
            puzzle = kind(chance)
            while is_held_out(puzzle[0]) != held_out:
                puzzle = kind(chance)
            yield puzzle


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_PART == 0


def row(puzzle: Puzzle) -> dict:
    question, thoughts, answer = puzzle
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "reasoning_content": thoughts, "content": answer}]}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Make chats without a download: puzzles with reasoning, as JSONL "
                           "of OpenAI's messages.")
    add = parser.add_argument
    add("--output", type=values.path, required=True, metavar="FILE", help="what is trained on")
    add("--held-out", type=values.path, required=True, metavar="FILE", help="questions that are not in --output")
    add("--rows", type=values.positive_int, default=4000, metavar="N", help="of --output (4000)")
    add("--held-out-rows", type=values.positive_int, default=200, metavar="N", help="of --held-out (200)")
    add("--seed", type=values.count, default=1234, metavar="N", help="(1234)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    for option, path, held_out, number in (("--output", args.output, False, args.rows),
                                           ("--held-out", args.held_out, True, args.held_out_rows)):
        refuse_directory(option, path)
        write(path, args.seed + held_out, held_out, number)
        print(f"{path}: {number:,} conversations")
    return 0


def write(path: Path, seed: int, held_out: bool, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as file:
        for _, puzzle in zip(range(number), puzzles(seed, held_out)):
            file.write(json.dumps(row(puzzle)) + "\n")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return exit_status(PROGRAM, lambda: run(parse_arguments(argv)))
