"""The command line of tools/generate.py, without torch until there is a text to continue."""

import argparse
import sys
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.parser import TOKENIZER_TYPES
from megatron_deepseek.cli.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "generate.py"
SEQ_LENGTH = 256  # of a model that can see as much


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Continue a prompt with a trained model.")
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR",
        help="checkpoints (--save of a training), or a Hugging Face directory")
    add("--ckpt-step", type=values.count, metavar="ITERATION", help="of --load, this checkpoint instead of the last")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0], help=f"({TOKENIZER_TYPES[0]})")
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json or its directory (the one that is with the weights)")
    add("--prompt", required=True, help='may be "": the model begins a document')
    add("--max-new-tokens", type=values.count, default=64, metavar="N", help="(64)")
    add("--temperature", type=values.non_negative, default=0.7, metavar="X", help="0: always the likeliest token (0.7)")
    add("--top-p", type=values.fraction, default=0.9, metavar="X",
        help="sample from the likeliest tokens of this total probability (0.9)")
    add("--seq-length", type=values.positive_int, metavar="N",
        help=f"longest context that the model sees ({SEQ_LENGTH}, or all that it can)")
    add("--seed", type=values.count, default=1234, metavar="N", help="(1234)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The exit status: 2 for what a user can mend, with one line that says what."""

    def generate() -> int:
        args = parse_arguments(argv)
        with quick_imports():
            from megatron_deepseek.inference.generate import run
        return run(args)

    return exit_status(PROGRAM, generate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
