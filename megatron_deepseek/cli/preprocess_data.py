"""The command line of tools/preprocess_data.py; arguments of Megatron-LM's tool of this name keep their meaning."""

import argparse
import dataclasses
import os
import sys

from megatron_deepseek.data.preprocess.report import Report
from megatron_deepseek.data.preprocess.run import preprocess
from megatron_deepseek.data.preprocess.settings import (
    BACKENDS,
    INPUT_FORMATS,
    TEXT_UNITS,
    WIKITEXT_UNITS,
    Content,
    Execution,
    PreprocessSettings,
    Selection,
)
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

PROGRAM = "preprocess_data.py"
DATASET_COMMANDS = ("inspect", "verify", "merge", "split", "head")
RANK_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
EXAMPLE = """example:
  python tools/preprocess_data.py --input corpus/ --output-prefix data/mine --tokenizer-model tokenizer.json \\
      --append-eod --workers 8
writes data/mine_text_document.bin and .idx, for --data-path data/mine_text_document, and data/mine_report.json.
Killed, the same command continues where it was.
`preprocess_data.py inspect|verify|merge|split|head --help`: what can be done with a dataset."""


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(PROGRAM, description="Turn text into indexed datasets (.bin, .idx).", epilog=EXAMPLE,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_input(parser.add_argument_group("input"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_documents(parser.add_argument_group("documents"))
    _add_selection(parser.add_argument_group("selection"))
    _add_output(parser.add_argument_group("output"))
    _add_execution(parser.add_argument_group("execution (changes no byte of the output)"))
    return parser


def _add_input(group):
    add = group.add_argument
    add("--input", nargs="+", required=True, metavar="PATH",
        help="files, quoted globs, directories, or - for standard input: JSONL, text, parquet or WikiText's .tokens; "
             ".gz, .zst, .xz")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY",
        help="keys or columns to take text from, a dataset each; a.b is b within a (default: text)")
    add("--input-format", choices=INPUT_FORMATS, default="auto",
        help="auto: by the files' endings, and JSONL where they say nothing (default: %(default)s)")
    add("--text-unit", choices=TEXT_UNITS, default="file",
        help="what is one document in plain text (default: %(default)s)")
    add("--split-wikitext", nargs="?", choices=WIKITEXT_UNITS, const="article",
        help="the input has WikiText's form, as files named *.tokens are read anyway: a document is an article, from "
             "its line ' = Title = ' to the next, or a section without headings, its words joined to prose")
    add("--on-error", choices=("skip", "fail"), default="skip",
        help="what to do about a document that cannot be used (default: skip, count and report it)")
    add("--max-errors", type=int, default=1000, metavar="N", help="skip at most so many (default: %(default)s)")
    add("--allow-damaged-files", type=int, default=0, metavar="N",
        help="of up to N files that break off or are damaged, take what can be read (default: %(default)s, such a "
             "file ends the run)")


def _add_tokenizer(group):
    add = group.add_argument
    add("--tokenizer-type", default="HuggingFaceTokenizer",
        help="HuggingFaceTokenizer, ByteTokenizer or NullTokenizer (default: %(default)s)")
    add("--tokenizer-model", help="a tokenizer.json or its directory; for NullTokenizer the number of ids")
    add("--tokenizer-backend", choices=BACKENDS, default="auto",
        help="auto: gigatoken where it is installed and its ids equal those of tokenizers on a sample of the input, "
             "else tokenizers (default: %(default)s)")


def _add_documents(group):
    add = group.add_argument
    add("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document token")
    add("--append-bos", action="store_true", help="begin each document with the tokenizer's begin token")
    add("--split-sentences", action="store_true", help="index sentences, not only documents, by NLTK's Punkt")
    add("--keep-newlines", action="store_true", help="keep the blanks between sentences when splitting")
    add("--lang", default="english", help="language to split by (default: %(default)s)")
    add("--nltk-data-dir", metavar="DIR", help="where NLTK's models are; without one, Punkt learns from the input")
    add("--fim-rate", type=float, default=0.0, metavar="P",
        help="share of documents to rearrange for fill-in-the-middle; DeepSeek-V3: 0.1 (default: 0)")
    add("--fim-spm-rate", type=float, default=0.0, metavar="P",
        help="share of those in the order suffix, prefix, middle instead of prefix, suffix, middle (default: 0, as V3)")
    add("--seed", type=int, default=1234, help="of --fim-rate (default: %(default)s)")


def _add_selection(group):
    add = group.add_argument
    add("--min-chars", type=int, default=0, metavar="N", help="leave out shorter documents")
    add("--max-chars", type=int, metavar="N", help="leave out longer documents")
    add("--dedup", choices=("exact",), help="exact: keep the first of documents with equal texts (128-bit hashes)")
    add("--max-documents", type=int, metavar="N", help="the first N documents that are left")
    add("--shuffle-seed", type=int, metavar="SEED", help="put the documents in a random order")
    add("--seq-length", type=int, metavar="N",
        help="lay the ids of all documents end to end and cut them into documents of N + 1, as MindFormers' "
             "wikitext_to_bin does; what is left at the end is dropped")


def _add_output(group):
    add = group.add_argument
    add("--output-prefix", required=True, metavar="PREFIX",
        help="output is {prefix}_{key}_document.bin and .idx (_sentence when split) and {prefix}_report.json")
    add("--no-merge", dest="merge", action="store_false",
        help="leave datasets of part size and name them in {prefix}_{key}_document.blend: lines of tokens and prefix")


def _add_execution(group):
    add = group.add_argument
    add("--workers", type=int, default=1, help="processes that tokenise (default: %(default)s)")
    add("--rank", type=int, help="of several machines that share the work and the output's folder "
                                 "(default: from torchrun's or Slurm's variables, else 0)")
    add("--world-size", type=int, help="number of those machines or processes (default: likewise, else 1)")
    add("--part-bytes", type=int, metavar="N",
        help="input to a part, after which a killed run continues (default: 2 to 64 MB by the size of the input)")
    add("--overwrite", action="store_true", help="replace a finished dataset of this prefix")
    add("--discard-parts", action="store_true", help="start over where parts of an unfinished run are there")
    add("--log-interval", type=int, default=1000, help="documents between progress lines (default: %(default)s)")
    add("--partitions", type=int, default=1,
        help="accepted for Megatron-LM's sake, where it must divide --workers: here parts are made by themselves")
    add("--keep-sequential-samples", action="store_true", help="accepted: the order is always kept here")


def settings_from(arguments: argparse.Namespace) -> PreprocessSettings:
    """Build the settings; raise ValueError for values that are impossible."""
    values = vars(arguments)
    if arguments.partitions < 1 or arguments.workers % arguments.partitions:
        raise ValueError(f"--partitions {arguments.partitions} does not divide --workers {arguments.workers}")
    values["json_keys"] = tuple(arguments.json_keys)
    values["input_format"], values["text_unit"] = _form(arguments)
    values["rank"], values["world_size"] = _place(arguments.rank, arguments.world_size)
    groups = {name: kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
              for name, kind in (("content", Content), ("selection", Selection), ("execution", Execution))}
    return PreprocessSettings(tuple(arguments.input), arguments.output_prefix, **groups)


def _form(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the input's format and what is a document in it; --split-wikitext stands for both."""
    if arguments.split_wikitext is None:
        return arguments.input_format, "article" if arguments.input_format == "wikitext" else arguments.text_unit
    if arguments.input_format not in ("auto", "wikitext"):
        raise ValueError(f"--split-wikitext {arguments.split_wikitext} conflicts with --input-format "
                         f"{arguments.input_format}")
    return "wikitext", arguments.split_wikitext


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"--rank {rank} and --world-size {world_size}: give both or neither")
    if rank is not None:
        return rank, world_size
    for names in RANK_VARIABLES:
        found = [os.environ.get(name, "") for name in names]
        if all(map(str.isdigit, found)):
            return int(found[0]), int(found[1])
    return 0, 1


def main(arguments: list[str]) -> int:
    """Run preprocessing, or a command of indexed_dataset.py if its name (`inspect`, `verify`, ...) comes first."""
    if arguments and arguments[0] in DATASET_COMMANDS:
        from megatron_deepseek.cli import indexed_dataset
        return indexed_dataset.main(arguments)

    def run() -> int:
        settings = settings_from(build_parser().parse_args(arguments))
        report = preprocess(settings)
        if report is not None:
            _print(settings, report)
        return 0

    return exit_status(PROGRAM, run, "interrupted; the same command continues")


def _print(settings: PreprocessSettings, report: Report):
    print("\n".join(report.lines()))
    for key in settings.content.json_keys:
        prefix = settings.prefix_of(key)
        print(f"{prefix}.bin {prefix}.idx" if settings.execution.merge else f"{prefix}.blend")
    sys.stdout.flush()
