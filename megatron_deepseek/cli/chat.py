"""The command line of tools/chat.py.

It imports torch only once the arguments are right, so that --help and mistakes in options answer at once.
"""

import argparse
import importlib.util
import sys
from dataclasses import replace

from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "chat.py"
USUAL_LENGTH = 8192  # tokens of a chat, for models that can see more
_IDLE_MINUTES = 7 * 24 * 60  # for which other ranks wait for a question


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Chat with a trained model. /help lists the commands of the chat.")
    add = parser.add_argument_group("chat").add_argument
    add("--template", metavar="NAME", default="auto",
        help="of the chat: a family, or a file of Jinja (auto: the checkpoint's own, else what its tokenizer tells)")
    add("--system", default="", metavar="TEXT", help="what the model is told before the chat")
    add("--thinking", action=argparse.BooleanOptionalAction,
        help="ask for reasoning, or for none (as the template has it)")
    for group in (options.add_model, options.add_engine, options.add_layout):
        group(parser)
    options.add_sampling(parser, max_new_tokens=1024, temperature=0.7, top_p=0.9)
    args = parser.parse_args(argv)
    options.layout_of(args)
    replace(SamplingParameters(), **options.sampling_options(args))
    return args


def run(args: argparse.Namespace) -> int:
    """Let the user chat until the input ends; return the exit status."""
    with quick_imports():
        import torch.distributed as dist

        from megatron_deepseek.cli.chat_session import ChatSession
        from megatron_deepseek.inference.loading import checked_length, join_ranks, load_model
        from megatron_deepseek.inference.replicas import Replicas
    files = options.open_files(args)
    chat_format = options.chat_format(args, files, args.thinking)
    length = checked_length(files.config, args.seq_length)
    length = length if args.seq_length else min(length, USUAL_LENGTH)
    model = load_model(files, join_ranks(options.layout_of(args), _IDLE_MINUTES), options.load_settings(args, length))
    replicas = Replicas(model, replace(options.engine_settings(args, length), max_running=1), stream=True)
    options.warm_up(args, replicas)
    if not replicas.leads:
        replicas.follow()
    else:
        parameters = replace(files.defaults, **options.sampling_options(args))
        with replicas:
            talk(ChatSession(replicas, chat_format, parameters, _write, sys.stdout.isatty(), args.system))
    dist.destroy_process_group()
    return 0


def talk(session) -> None:
    """Read lines until the end of the input or /exit; Ctrl-C while a line is typed throws that line away."""
    interactive = sys.stdin.isatty()
    if interactive and importlib.util.find_spec("readline"):
        import readline  # noqa: F401 (input() then edits lines and remembers them)
    if interactive:
        _write(f"{session.format.name}; /help lists the commands, Ctrl-D leaves\n")
    while True:
        try:
            if not session.enter(input("> " if interactive else "")):
                return
        except EOFError:
            _write("\n" if interactive else "")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            _write("\n")
        except UnicodeDecodeError as error:
            _write(f"the line is not UTF-8: {error.reason}\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return options.one_voice(lambda: exit_status(PROGRAM, lambda: run(parse_arguments(argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
