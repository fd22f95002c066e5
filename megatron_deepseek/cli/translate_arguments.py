"""The command line of tools/translate_arguments.py. It must not import torch."""

from collections.abc import Sequence

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.llama_factory.reading import processes, read_words
from megatron_deepseek.arguments.llama_factory.translation import Processes, translate
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

PROGRAM = "translate_arguments.py"


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM, usage=f"{PROGRAM} [--nproc-per-node N] [--nnodes N] FILE [key=value ...] | -- COMMAND LINE",
        description="Print the command here that trains what a YAML file or command line of LLaMA-Factory does, as a "
        "shell script whose comments say what differs and which keys nothing stands for.")
    add = parser.add_argument
    add("--nproc-per-node", type=values.positive_int, metavar="N", help="ranks on a node (NPROC_PER_NODE, or 1)")
    add("--nnodes", type=values.positive_int, metavar="N", help="nodes (NNODES, or 1)")
    add("words", nargs="+", metavar="WORD", help="a YAML or JSON file and key=value, or llamafactory-cli train ...")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""

    def run() -> int:
        args = build_parser().parse_args(argv)
        given, environment = read_words(args.words)
        per_node, nodes = processes(environment)
        per_node = args.nproc_per_node or per_node or given.get("ray_num_workers")
        asked = Processes(per_node or 1, args.nnodes or nodes or 1, known=per_node is not None)
        print("\n".join(translate(given, asked).lines()))
        return 0

    return exit_status(PROGRAM, run)
