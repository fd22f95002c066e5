"""The command line of tools/convert_checkpoint.py.

It must not import torch, so that --help and mistakes in options answer at once. The work is in
convert_checkpoint_run.py.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence

from megatron_deepseek.arguments import values
from megatron_deepseek.checkpoint.convert.chat_templates import template_names
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "convert_checkpoint.py"
FORMATS = ("hf", "megatron", "native")  # the keys of formats.OPEN, which needs torch
TYPES = ("bf16", "fp16", "fp32", "fp8", "q8_0")  # the keys of conversion.DTYPES and gguf/output.TYPES
SCALE_FORMATS = ("float32", "ue8m0")  # block_fp8.SCALE_FORMATS, which needs torch


def layers(text: str) -> frozenset[int]:
    """Parse a list of layers such as 0,3-5; raise ArgumentTypeError if it is none."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,3-5")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=PROGRAM, allow_abbrev=False,
                           description="Convert DeepSeek checkpoints, in memory that does not grow with the model.")
    add = parser.add_argument
    add("--from", dest="origin", required=True, choices=FORMATS, help="format of --load")
    add("--to", required=True, choices=(*FORMATS, "gguf"), help="format of --save; gguf is llama.cpp's")
    add("--load", type=values.path, required=True, metavar="DIR",
        help="a Hugging Face directory, or one of checkpoints")
    add("--save", type=values.path, metavar="DIR", help="made whole, by a rename at the end")
    add("--dtype", choices=TYPES,
        help="type of the weights (as stored; FP8 becomes bf16 in native ones and in GGUF); q8_0 is GGUF's alone")
    add("--fp8-scale-format", choices=SCALE_FORMATS,
        help="of FP8 weights: any value, or ue8m0, powers of two as in V3.1 (as in the source, else float32)")
    add("--max-shard-size", type=values.size, metavar="SIZE",
        help="of a safetensors file (5GB), or a GGUF file (one file, whatever its size)")
    add("--workers", type=values.positive_int, default=1, metavar="N", help="threads; under torchrun, of each rank (1)")
    add("--no-mtp", action="store_true", help="leave the Multi-Token Prediction modules out")
    add("--assets", type=values.path, metavar="DIR",
        help="where tokenizer and generation_config.json are (the source's); with --from megatron also config.json")
    add("--chat-template", metavar="NAME|FILE", help="put it beside the tokenizer: "
        f"{', '.join(template_names())}, or a file of yours (the source's, if it has one)")
    add("--gguf-pre-tokenizer", metavar="NAME",
        help="llama.cpp's name of how texts are cut (found by the tokenizer, unless it cuts in a way of its own)")
    add("--dry-run", action="store_true", help="check everything, list what would be written, write nothing")
    add("--layers", type=layers, metavar="0,3-5", help="list these layers only; means --dry-run")
    return parser


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""

    def convert_checkpoint() -> int:
        args = build_parser().parse_args(argv)
        with quick_imports():
            from megatron_deepseek.cli.convert_checkpoint_run import convert
        convert(args, environ)
        return 0

    return exit_status(PROGRAM, convert_checkpoint, "interrupted; the same command continues")
