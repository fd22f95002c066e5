"""The command line of tools/indexed_dataset.py: inspect, verify, merge, split and head for indexed datasets."""

import dataclasses
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_deepseek.data.index_file import IndexFile, check_output_prefix, open_index
from megatron_deepseek.data.inspection import describe, measure, read_documents, verify
from megatron_deepseek.data.merge import merge_datasets, part_prefixes, split_dataset
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status


def main(argv: list[str]) -> int:
    """Run a command; return 0, or 2 for a damaged dataset or a wrong argument (other statuses: launch/ending.py)."""
    named = [word for word in argv[:1] if not word.startswith("-")]

    def run() -> int:
        arguments = parse_arguments(argv)
        return arguments.run(arguments)

    return exit_status(" ".join(["indexed_dataset.py", *named]), run)


def parse_arguments(argv: list[str]):
    parser = OneLineParser(prog="indexed_dataset.py", description="Indexed datasets (.bin and .idx): look into them, "
                           "check, join and cut them. A dataset is given by its prefix, or by the name of its .idx; a "
                           "directory stands for the datasets in it, by name.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_verify, _add_merge, _add_split, _add_head):
        add(commands)
    return parser.parse_args(argv)


def _add_inspect(commands):
    parser = commands.add_parser("inspect", help="documents, sequences, tokens, a histogram of lengths")
    parser.add_argument("dataset", nargs="+", help="prefix, .idx or directory")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each dataset")
    parser.set_defaults(run=run_inspect)


def _add_verify(commands):
    parser = commands.add_parser("verify", help="every length, pointer, document and id; status 2 if any is wrong")
    parser.add_argument("dataset", nargs="+", help="prefix, .idx or directory")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="ids must be below N (they must not be negative)")
    parser.add_argument("--most", type=int, default=20, metavar="N", help="stop after so many faults of a dataset (20)")
    parser.set_defaults(run=run_verify)


def _add_merge(commands):
    parser = commands.add_parser("merge", help="join datasets, in the order given, into one")
    parser.add_argument("dataset", nargs="+", help="prefix, .idx or directory")
    _add_output(parser, "output is {prefix}.bin and .idx")
    parser.set_defaults(run=run_merge)


def _add_split(commands):
    parser = commands.add_parser("split", help="cut a dataset into runs of documents")
    parser.add_argument("dataset", help="prefix or .idx")
    parts = parser.add_mutually_exclusive_group(required=True)
    parts.add_argument("--parts", type=int, metavar="N", help="so many parts, with as many documents each")
    parts.add_argument("--weights", type=float, nargs="+", metavar="W", help="documents in proportion to these")
    _add_output(parser, "output is {prefix}_0.bin and .idx, {prefix}_1 ...")
    parser.set_defaults(run=run_split)


def _add_output(parser, text: str):
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    parser.add_argument("--workers", type=int, default=2, help="threads that copy (2)")


def _add_head(commands):
    parser = commands.add_parser("head", help="print documents, as text or as ids")
    parser.add_argument("dataset", help="prefix or .idx")
    parser.add_argument("-n", "--documents", type=int, default=5, metavar="N", help="how many (5)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first, from 0 (0)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="print so many tokens of each (256)")
    parser.add_argument("--tokenizer-type", default=None,
                        help="HuggingFaceTokenizer, ByteTokenizer or NullTokenizer (the first with --tokenizer-model, "
                             "else ids are printed)")
    parser.add_argument("--tokenizer-model", help="a tokenizer.json or its directory")
    parser.set_defaults(run=run_head)


def expand(names: list[str]) -> list[str]:
    """Return the prefixes of datasets that are named by prefix, by .idx, or by the directory that holds them."""
    prefixes = []
    for name in names:
        found = sorted(str(path) for path in Path(name).glob("*.idx")) if Path(name).is_dir() else [name]
        if not found:
            raise ValueError(f"{name} holds no .idx")
        prefixes += [path.removesuffix(".idx") if os.path.isfile(path) else path for path in found]
    return prefixes


def run_inspect(arguments) -> int:
    for prefix in expand(arguments.dataset):
        statistics = measure(open_index(prefix, "dataset"))
        if arguments.json:
            print(json.dumps(dataclasses.asdict(statistics)))
        else:
            print(describe(statistics))
    return 0


def run_verify(arguments) -> int:
    if arguments.most < 1 or (arguments.vocab_size is not None and arguments.vocab_size < 1):
        raise ValueError(f"--most {arguments.most} and --vocab-size {arguments.vocab_size} must be at least 1")
    damaged = 0
    for prefix in expand(arguments.dataset):
        try:
            faults = _verify_one(open_index(prefix, "dataset"), arguments)
        except ValueError as error:
            faults = (str(error),)
        for fault in faults:
            print(fault)
        if len(faults) >= arguments.most:
            print(f"{prefix}: stopped after {len(faults)} faults (--most {arguments.most})")
        damaged += bool(faults)
    return 2 if damaged else 0


def _verify_one(index: IndexFile, arguments) -> tuple[str, ...]:
    with _bar(index.prefix, _size(index)) as bar:
        verdict = verify(index, arguments.vocab_size, arguments.most, bar.update)
    if not verdict.damage:
        print(f"{index.prefix}: sound; {index.num_document_entries - 1:,} documents, {index.num_sequences:,} "
              f"sequences, ids from {verdict.least} to {verdict.greatest}")
    return verdict.damage


def refuse_existing(outputs: list[str], overwrite: bool):
    """Raise ValueError if one of the output datasets is there and --overwrite is not given."""
    there = [prefix + suffix for prefix in outputs for suffix in (".idx", ".bin") if os.path.exists(prefix + suffix)]
    if there and not overwrite:
        raise ValueError(f"--output-prefix: {there[0]} exists already; --overwrite replaces it")


def run_merge(arguments) -> int:
    check_output_prefix(arguments.output_prefix)
    refuse_existing([arguments.output_prefix], arguments.overwrite)
    prefixes = expand(arguments.dataset)
    total = sum(os.path.getsize(open_index(prefix, "dataset").prefix + ".bin") for prefix in prefixes)
    with _bar("copied", total) as bar:
        index = merge_datasets(prefixes, arguments.output_prefix, arguments.workers, bar.update)
    _say_written(index)
    return 0


def run_split(arguments) -> int:
    if arguments.parts is not None and arguments.parts < 1:
        raise ValueError(f"--parts {arguments.parts}: it must be at least 1")
    prefix, = expand([arguments.dataset])
    weights = arguments.weights or [1.0] * arguments.parts
    check_output_prefix(arguments.output_prefix)
    refuse_existing(part_prefixes(arguments.output_prefix, len(weights)), arguments.overwrite)
    with _bar("copied", os.path.getsize(open_index(prefix, "dataset").prefix + ".bin")) as bar:
        parts = split_dataset(prefix, arguments.output_prefix, weights, arguments.workers, bar.update)
    for part in parts:
        _say_written(part)
    return 0


def run_head(arguments) -> int:
    if min(arguments.documents, arguments.start, arguments.max_tokens) < 0:
        raise ValueError(f"--documents {arguments.documents}, --start {arguments.start} and --max-tokens "
                         f"{arguments.max_tokens} must not be negative")
    tokenizer = None
    if arguments.tokenizer_type or arguments.tokenizer_model:
        tokenizer = build_tokenizer(arguments.tokenizer_type or "HuggingFaceTokenizer", arguments.tokenizer_model)
    prefix, = expand([arguments.dataset])
    index = open_index(prefix, "dataset")
    if arguments.start >= index.num_document_entries - 1:
        raise ValueError(f"--start {arguments.start}: {prefix} has {index.num_document_entries - 1} documents")
    for document in read_documents(index, arguments.start, arguments.documents, arguments.max_tokens):
        left = document.length - len(document.ids)
        print(f"--- document {document.number}: {document.length:,} tokens in {document.num_sequences:,} sequences"
              + (f", the first {len(document.ids):,}:" if left else ":"))
        ids = document.ids.tolist()
        print(" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids))
    return 0


def _size(index: IndexFile) -> int:
    return os.path.getsize(index.path) + os.path.getsize(index.prefix + ".bin")


def _bar(text: str, num_bytes: int) -> tqdm:
    return tqdm(total=num_bytes, desc=text, unit="B", unit_scale=True, file=sys.stderr, leave=False,
                disable=not sys.stderr.isatty())


def _say_written(index: IndexFile):
    print(f"{index.prefix}: {index.num_document_entries - 1:,} documents, {index.num_sequences:,} sequences, "
          f"{os.path.getsize(index.prefix + '.bin') // index.token_dtype.itemsize:,} tokens")
