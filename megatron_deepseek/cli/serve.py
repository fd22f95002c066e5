"""The command line of tools/serve.py.

It imports torch only once the arguments are right, so that --help and mistakes in options answer at once.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.cli import inference_options as options
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.packages import how_to_install
from megatron_deepseek.quick_imports import quick_imports
from megatron_deepseek.serving.access import check_origins, read_keys

PROGRAM = "serve.py"
NEEDED = ("starlette", "uvicorn", "prometheus-client")  # the extra [serve]
_NO_LENGTH = 2**62  # of answers, where generation_config.json says nothing of it


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Serve a trained model to OpenAI's clients and to a browser.",
                           epilog="Under torchrun ranks share the model: see parallelism. docs/serving.md has more.")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine (127.0.0.1)")
    add("--port", type=values.count, default=8000, metavar="P", help="0: any that is free (8000)")
    add("--api-key-file", type=Path, metavar="FILE", help="keys, one a line, of which a request must bring one")
    add("--served-model-name", nargs="+", metavar="NAME", help="what the model is called (the name of --load)")
    add("--allowed-origins", nargs="+", default=[], metavar="URL", help="web pages elsewhere that may ask, or * (none)")
    add("--template", metavar="NAME", default="auto",
        help="of chats: a family, or a file of Jinja (auto: the checkpoint's own, else what its tokenizer tells)")
    add("--thinking", action=argparse.BooleanOptionalAction,
        help="ask for reasoning, or for none, where a request does not say (as the template has it)")
    add("--log-requests", action="store_true", help="a line on stderr for each: path, status, seconds")
    add("--verbose", action="store_true", help="say more of mistakes; it may show paths and prompts")
    add = parser.add_argument_group("limits").add_argument
    add("--max-queue", type=values.count, default=256, metavar="N", help="answers that may wait (256)")
    add("--max-body", type=values.size, default=8 * 2**20, metavar="SIZE", help="of a request (8MiB)")
    add("--body-seconds", type=values.positive, default=30.0, metavar="S", help="for sending a request (30)")
    add("--idle-seconds", type=values.positive, default=30.0, metavar="S",
        help="for a connection that sends nothing, or reads nothing of its answer (30)")
    add("--max-connections", type=values.positive_int, default=1024, metavar="N", help="at a time (1024)")
    add("--request-seconds", type=values.positive, default=600.0, metavar="S", help="for an answer (600)")
    add("--drain-seconds", type=values.positive, default=25.0, metavar="S",
        help="for answers that run when the server is told to end (25)")
    for group in (options.add_model, options.add_engine, options.add_layout):
        group(parser)
    parser.set_defaults(usual=SamplingParameters(max_tokens=_NO_LENGTH))
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if args.port > 65535:
        raise ValueError(f"--port {args.port} is greater than 65535")
    missing = [each for each in NEEDED if importlib.util.find_spec(each.replace("-", "_")) is None]
    if missing:
        raise ValueError(f"the server needs {missing[0]}: {how_to_install(missing[0])}")
    check_origins(args.allowed_origins)
    if args.api_key_file is not None:
        read_keys(args.api_key_file)
    options.layout_of(args)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; return the exit status."""
    with quick_imports():
        import torch.distributed as dist

        from megatron_deepseek.cli import serve_run
    status = serve_run.serve(args)
    if not status:  # else other ranks may be gone, for which that would wait
        dist.destroy_process_group()
    return status


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return options.one_voice(lambda: exit_status(PROGRAM, lambda: run(parse_arguments(argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
