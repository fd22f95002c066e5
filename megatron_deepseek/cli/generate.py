"""The command line of tools/generate.py.

It imports torch only once the arguments are right, so that --help and mistakes in options answer at once.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.model.architecture.presets import describe_model
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "generate.py"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Continue prompts with a trained model.",
                           epilog="Under torchrun ranks share the model: see parallelism. docs/inference.md has more.")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", help='may be "": the model begins a document')
    add("--prompts", type=Path, metavar="FILE.jsonl",
        help='lines of {"prompt": TEXT or [IDS]} or {"messages": [...]}, with sampling of their own if wanted')
    add("--output", type=Path, metavar="FILE.jsonl",
        help="write answers there, as they are ready; what is there already is not answered again (standard output)")
    add("--template", metavar="NAME", default="auto",
        help="of chats: a family, or a file of Jinja (auto: the checkpoint's own, else what its tokenizer tells)")
    add("--n", type=values.positive_int, metavar="N", help="answers to each prompt (1)")
    add("--logprobs", type=values.count, metavar="K",
        help="with --prompts: log-probabilities of answers' tokens, and of the K likeliest")
    for group in (options.add_model, options.add_engine, options.add_layout):
        group(parser)
    options.add_sampling(parser, max_new_tokens=64, temperature=0.7, top_p=0.9)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("either --prompt or --prompts is needed" + (", not both" if args.prompts else ""))
    if args.prompts is None and (args.output or args.logprobs is not None):
        raise ValueError(f"{'--output' if args.output else '--logprobs'} needs --prompts")
    if args.prompt is not None:
        try:
            args.prompt.encode()
        except UnicodeEncodeError as error:  # Python makes a lone surrogate of each byte that is no text
            raise ValueError(f"--prompt {args.prompt!r} is not UTF-8: character {error.start} is no text") from error
    options.layout_of(args)
    replace(SamplingParameters(), **options.sampling_options(args))


def run(args: argparse.Namespace) -> int:
    """Write answers to the prompts; return the exit status."""
    with quick_imports():
        import torch.distributed as dist

        from megatron_deepseek.cli import generate_run
    files = options.open_files(args)
    lines = generate_run.read_prompts(args, files)
    done = generate_run.answered(args, lines)
    if is_huggingface(files.directory):
        for line in describe_model(str(files.directory)):
            print(line, file=sys.stderr)
    replicas = generate_run.build(args, files, lines)
    if replicas.leads:
        with replicas:
            generate_run.answer(args, replicas, [line for line in lines if line.number not in done], len(done))
    else:
        replicas.follow()
    dist.destroy_process_group()
    return 0


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return options.one_voice(lambda: exit_status(PROGRAM, lambda: run(parse_arguments(argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
