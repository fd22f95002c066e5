"""The command line of tools/sample_answers.py.

It imports torch only once the arguments are right, so that --help and mistakes in options answer at once.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.data.preprocess.files import refuse_directory
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports
from megatron_deepseek.rewards.selection import ALL, ANY, BEST, QUESTION
from megatron_deepseek.rewards.spec import parse_rewards
from megatron_deepseek.rewards.words import SCRIPTS

PROGRAM = "sample_answers.py"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        prog=PROGRAM, description="Answer prompts several times, and keep the answers that rewards accept as data for "
        "fine-tuning.",
        epilog="Under torchrun ranks share the model: see parallelism. docs/sampling_answers.md has more.")
    _add_prompts(parser)
    _add_judging(parser)
    for group in (options.add_model, options.add_engine, options.add_layout):
        group(parser)
    options.add_sampling(parser, max_new_tokens=2048, temperature=0.6, top_p=0.95)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts").add_argument
    add("--input", nargs="+", required=True, metavar="FILE",
        help="rows in any form that fine-tuning reads, JSONL or parquet; an answer at their end is left out")
    add("--output", type=values.path, required=True, metavar="FILE.jsonl",
        help="rows for fine-tuning; beside it FILE.answers.jsonl and FILE.rewards.jsonl, from which a killed run goes "
        "on, and FILE.statistics.json")
    add("--prompt-column", metavar="NAME", help="the column with a text or messages (messages, prompt, question, ...)")
    add("--answer-column", metavar="NAME", help="the column with the right answer, for rewards (answer, solution)")
    add("--system", metavar="TEXT", help="before prompts that have no system text (none)")
    add("--append", default="", metavar="TEXT", help="behind every question, in the rows too (nothing)")
    add("--raw", action="store_true", help="continue the prompts as they are, without a template")
    add("--template", metavar="NAME", default="auto",
        help="a family, or a file of Jinja (auto: the checkpoint's own, else what its tokenizer tells)")
    add("--thinking", action=argparse.BooleanOptionalAction, help="ask for reasoning (as the template has it)")
    add("--n", type=values.positive_int, default=4, metavar="N", help="answers to each prompt (4)")


def _add_judging(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("judging", "docs/rewards.md says what a reward is").add_argument
    add("--reward", action="append", default=[], metavar="SPEC[:WEIGHT]",
        help="math, exact, format, regex, code, ..., FILE.py:NAME or model:DIR; may be given several times")
    add("--accept-at", type=float, metavar="X", help="the least weighted sum of rewards (1)")
    add("--reward-seconds", type=values.positive, default=30.0, metavar="S", help="of a call on the clock (30)")
    add("--reward-processes", type=values.positive_int, default=2, metavar="N", help="that judge at a time (2)")
    add("--max-repetition", type=values.fraction, default=0.5, metavar="X",
        help="reject answers of which a larger share of runs of four words was there before (0.5; 1: none)")
    add("--language", choices=(ANY, QUESTION, *SCRIPTS), default=QUESTION,
        help="reject answers with letters of other scripts than this language's, or the question's (question)")
    add("--min-language-share", type=values.fraction, default=0.9, metavar="X",
        help="the least share of letters of its script (0.9)")
    add("--max-answer-tokens", type=values.positive_int, metavar="N", help="reject longer ones; unfinished ones always")
    add("--keep", type=_keep, default=ALL, metavar="all|best|N",
        help="of a prompt's accepted answers: all, or the best or N best by reward (all)")


def _keep(text: str) -> str | int:
    if text in (ALL, BEST):
        return text
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {ALL} nor {BEST} nor a whole number from 1 up")
    return int(text)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    refuse_directory("--output", args.output)
    args.rewards = parse_rewards(args.reward)
    if args.accept_at is not None and not args.rewards:
        raise ValueError(f"--accept-at {args.accept_at:g} needs --reward")
    if args.accept_at is None and args.rewards:
        args.accept_at = 1.0
    if args.raw and (args.template != "auto" or args.thinking is not None or args.system is not None):
        raise ValueError("--raw asks without a template: leave out --template, --thinking and --system")
    if args.n > 1 and args.temperature == 0:
        raise ValueError(f"--n {args.n} with --temperature 0 are all the same")
    if any(Path(each).resolve() == args.output.resolve() for each in args.input):
        raise ValueError(f"--output {args.output} is --input")
    options.layout_of(args)
    replace(SamplingParameters(), **options.sampling_options(args))


def run(args: argparse.Namespace) -> int:
    """Sample, judge and write; return the exit status."""
    with quick_imports():
        import torch.distributed as dist

        from megatron_deepseek.cli import sample_answers_run
    sample_answers_run.sample(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return options.one_voice(lambda: exit_status(PROGRAM, lambda: run(parse_arguments(argv)),
                                                 "interrupted; the same command goes on from here"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
