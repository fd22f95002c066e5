"""The command line of tools/merge_lora.py; the work is in merge_lora_run.py. It must not import torch."""

import os
from collections.abc import Mapping, Sequence

from megatron_deepseek.arguments import values
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "merge_lora.py"
TYPES = ("bf16", "fp16", "fp32", "fp8")  # the keys of conversion.DTYPES, which needs torch


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog=PROGRAM, allow_abbrev=False,
                           description="Merge LoRA adapters into their base, in memory that does not grow with it.")
    add = parser.add_argument
    add("--base", type=values.path, required=True, metavar="DIR", help="a Hugging Face directory, or checkpoints")
    add("--adapter", type=str, nargs="+", required=True, metavar="DIR",
        help="adapters of PEFT, or WEIGHT DIR WEIGHT DIR ...: W + the sum of WEIGHT * scale * B A")
    add("--save", type=values.path, required=True, metavar="DIR",
        help="a Hugging Face directory, made whole by a rename at the end")
    add("--dtype", choices=TYPES, help="type of the weights (as stored in the base; FP8 is quantised again)")
    add("--adapter-for", choices=("vllm",), help="vllm: merge kv_b_proj and MTP modules alone, whose adapters it does "
        "not apply, and write the others to --save-adapter")
    add("--save-adapter", type=values.path, metavar="DIR", help="with --adapter-for: what is left of the adapter")
    add("--max-shard-size", type=values.size, default="5GB", metavar="SIZE", help="of a safetensors file (5GB)")
    add("--workers", type=values.positive_int, default=1, metavar="N", help="threads; under torchrun, of each rank (1)")
    return parser


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""

    def merge_lora() -> int:
        args = build_parser().parse_args(argv)
        with quick_imports():
            from megatron_deepseek.cli.merge_lora_run import merge
        merge(args, environ)
        return 0

    return exit_status(PROGRAM, merge_lora, "interrupted; the same command continues")
