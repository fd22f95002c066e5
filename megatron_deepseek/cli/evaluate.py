"""The command line of tools/evaluate.py.

It imports torch and lm-eval only once the arguments are right, so that --help and mistakes in options answer at once.
"""

import argparse
import sys
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "evaluate.py"
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")  # HumanEval's, and the end of a block of Markdown


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Evaluate a trained model.",
                           epilog="Under torchrun ranks share the model: see parallelism. docs/evaluation.md has more.")
    _add_what(parser)
    _add_tasks(parser)
    _add_programs(parser)
    options.add_model(parser)
    options.add_engine(parser, block_size=4)  # what texts share is whole blocks
    options.add_layout(parser)
    parser.set_defaults(usual=SamplingParameters())
    args = parser.parse_args(argv)
    _check(args)
    return args


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is evaluated", "any of these, one after the other").add_argument
    add("--tasks", nargs="+", metavar="TASK", help="of lm-eval: names, patterns, groups, or YAML and JSON files")
    add("--perplexity", type=Path, metavar="FILE", help="of a text, a JSONL file or an indexed dataset")
    add("--pass-at-k", type=Path, metavar="FILE.jsonl",
        help="programs for problems of HumanEval's form, each run in a sandbox")
    add("--output", "--output-path", "--output_path", type=Path, metavar="PATH",
        help="a folder, or FILE.json, for results; answers are kept beside them, from which a killed run goes on")
    add("--limit", type=values.positive, metavar="N", help="examples or problems; below 1, a part of them (all)")
    add("--batch-size", "--batch_size", type=_batch_size, metavar="N", help="as --max-running; auto: its default")
    add("--stride", type=values.positive_int, metavar="N",
        help="with --perplexity: tokens that each window but the first adds (all of the window)")
    add("--json-key", default="text", metavar="KEY", help="with --perplexity: of a JSONL file's texts (text)")


def _batch_size(text: str) -> int | None:
    """Return a number of requests at a time; None for lm-eval's auto and auto:N, since the engine fills its steps."""
    return None if text.partition(":")[0] == "auto" else values.positive_int(text)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tasks", "as lm-eval's own options of these names").add_argument
    add("--num-fewshot", "--num_fewshot", type=values.count, metavar="N",
        help="examples before each question (the task's own number)")
    add("--apply-chat-template", "--apply_chat_template", action="store_true", help="ask in chats (no)")
    add("--fewshot-as-multiturn", "--fewshot_as_multiturn", action=argparse.BooleanOptionalAction, default=True,
        help="in chats each example is a turn (yes)")
    add("--system-instruction", "--system_instruction", metavar="TEXT", help="before the examples (none)")
    add("--include-path", "--include_path", type=Path, metavar="DIR", help="a folder of further tasks")
    add("--confirm-run-unsafe-code", "--confirm_run_unsafe_code", action="store_true",
        help="run tasks that execute what the model writes, without a sandbox")
    add("--template", metavar="NAME", default="auto",
        help="of chats: a family, or a file of Jinja (auto: the checkpoint's own, else what its tokenizer tells)")
    add("--thinking", action=argparse.BooleanOptionalAction, help="ask for reasoning (as the template has it)")


def _add_programs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("programs (--pass-at-k)").add_argument
    add("--k", type=values.positive_int, nargs="+", default=[1], metavar="K", help="(1)")
    add("--samples", type=values.positive_int, metavar="N", help="programs of each problem (the largest --k)")
    add("--temperature", type=values.non_negative, metavar="X", help="(0 for one sample, else 0.8)")
    add("--top-p", type=values.fraction, default=0.95, metavar="X", help="(0.95)")
    add("--max-new-tokens", type=values.positive_int, default=512, metavar="N", help="of a program (512)")
    add("--stop", nargs="*", default=list(_STOPS), metavar="TEXT", help="ends a program (what begins the next thing)")
    add("--seed", type=values.count, default=1234, metavar="N", help="the same seed gives the same programs (1234)")
    add("--program-seconds", type=values.positive, default=3.0, metavar="S", help="of each on the clock (3)")
    add("--program-memory", type=values.size, default=512 * 2**20, metavar="SIZE", help="of each process (512MiB)")
    add("--workers", type=values.positive_int, default=2, metavar="N", help="programs that run at a time (2)")
    add("--unisolated", action="store_true",
        help="where this machine has no namespaces: run them with limits alone, which do not keep them from its files")


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if args.tasks is None and args.perplexity is None and args.pass_at_k is None:
        raise ValueError("at least one of --tasks, --perplexity and --pass-at-k is needed")
    if args.stride is not None and args.perplexity is None:
        raise ValueError(f"--stride {args.stride} needs --perplexity")
    for option, path in (("--perplexity", args.perplexity), ("--pass-at-k", args.pass_at_k)):
        if path is not None and not path.exists() and not path.with_name(path.name + ".idx").exists():
            raise ValueError(f"{option} {path}: there is no such file")
    args.samples = args.samples or max(args.k)
    if max(args.k) > args.samples:
        raise ValueError(f"--k {max(args.k)} needs at least as many --samples, and they are {args.samples}")
    if args.temperature is None:
        args.temperature = 0.0 if args.samples == 1 else 0.8
    if args.samples > 1 and not args.temperature:
        raise ValueError(f"--samples {args.samples} with --temperature 0 are all the same")
    args.max_running = args.batch_size or args.max_running
    options.layout_of(args)


def run(args: argparse.Namespace) -> int:
    """Evaluate the model, and return the exit status."""
    with quick_imports():
        import torch.distributed as dist

        from megatron_deepseek.cli import evaluate_run
    evaluate_run.evaluate(args)
    dist.destroy_process_group()
    return 0


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return options.one_voice(lambda: exit_status(PROGRAM, lambda: run(parse_arguments(argv)),
                                                 "interrupted; the same command with --output goes on from here"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
