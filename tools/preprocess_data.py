#!/usr/bin/env python3
"""Turn JSONL text into an indexed dataset for --data-path, with the arguments of Megatron-LM's tool of this name."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.data.preprocess import PreprocessSettings, preprocess


def parse_arguments():
    parser = argparse.ArgumentParser(description="Turn JSONL text into an indexed dataset (.bin, .idx).")
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".jsonl or .jsonl.gz files, or quoted globs")
    add("--json-keys", nargs="+", default=["text"], help="keys to take text from, a dataset each (default: text)")
    add("--split-sentences", action="store_true", help="index sentences, not only documents (needs NLTK's Punkt)")
    add("--keep-newlines", action="store_true", help="keep the blanks between sentences when splitting")
    add("--lang", default="english", help="language to split by (default: %(default)s)")
    add("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document token")
    add("--output-prefix", required=True, help="output is {prefix}_{key}_document.bin and .idx (_sentence when split)")
    add("--workers", type=int, default=1, help="processes that tokenise (default: %(default)s)")
    add("--partitions", type=int, default=1,
        help="accepted for Megatron-LM's sake, where it must divide --workers: here the lines stream through all "
             "workers as one, in the order of the input, and no partition files are written")
    add("--keep-sequential-samples", action="store_true", help="accepted: the order is always kept here")
    add("--log-interval", type=int, default=1000, help="documents between progress lines (default: %(default)s)")
    add("--tokenizer-type", default="HuggingFaceTokenizer",
        help="HuggingFaceTokenizer, ByteTokenizer or NullTokenizer (default: %(default)s)")
    add("--tokenizer-model", help="a tokenizer.json or its directory; for NullTokenizer the number of ids")
    return parser.parse_args()


def settings_from(arguments) -> PreprocessSettings:
    values = vars(arguments)
    partitions = values.pop("partitions")
    if partitions < 1 or arguments.workers % partitions:
        raise ValueError(f"--partitions {partitions} does not divide --workers {arguments.workers}")
    values.pop("keep_sequential_samples")
    values["input"], values["json_keys"] = tuple(arguments.input), tuple(arguments.json_keys)
    return PreprocessSettings(**values)


def main():
    summary = preprocess(settings_from(parse_arguments()))
    print(f"{summary.documents} documents, {summary.tokens} tokens in {summary.seconds:.1f} s "
          f"({summary.tokens / summary.seconds / 1e6:.2f} M tokens/s)")
    for prefix in summary.prefixes:
        print(f"{prefix}.bin {prefix}.idx")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("preprocess_data.py: interrupted; nothing was written")
