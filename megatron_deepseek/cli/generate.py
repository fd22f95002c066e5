"""The command line of tools/generate.py.

It imports torch only once the arguments are right, so that --help and mistakes in options answer at once.
"""

import argparse
import sys
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.parser import TOKENIZER_TYPES
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.model.architecture.presets import describe_model
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "generate.py"
SEQ_LENGTH = 256  # default, for models that can see as much


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
    parser.set_defaults(usual_seq_length=SEQ_LENGTH)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and the model's continuation; return the exit status."""
    with quick_imports():
        import torch.distributed as dist

        from megatron_deepseek.inference.generate import continuation, generate, load_model, check_request
    request = check_request(args)
    if is_huggingface(request.directory):
        for line in describe_model(str(request.directory)):
            print(line, file=sys.stderr)
    if len(request.prompt) > request.seq_length:
        print(f"{PROGRAM}: of the prompt's {len(request.prompt)} tokens the model sees the last --seq-length "
              f"{request.seq_length}", file=sys.stderr)
    model = load_model(request)
    tokens = list(generate(model, request.prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed,
                           request.tokenizer.eod, request.tokenizer.vocab_size))
    behind = request.prompt if args.prompt else []
    print(args.prompt + continuation(request.tokenizer, behind, tokens))
    dist.destroy_process_group()
    return 0


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return exit_status(PROGRAM, lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
