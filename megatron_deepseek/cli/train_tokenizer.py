"""The command line of tools/train_tokenizer.py, which trains a byte-level BPE tokenizer (arXiv 1508.07909) on text.

The pre-tokenization is DeepSeek-V3's, the vocabulary of any size. The four special tokens (begin and end of sentence,
User, Assistant) come first, then the 256 bytes, then the merges; the end of sentence ends a document. The same input
gives the same file, whatever the number of threads.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_deepseek.arguments import values
from megatron_deepseek.data.preprocess.files import refuse_directory, written_aside
from megatron_deepseek.data.preprocess.inputs import InputFile, find_inputs
from megatron_deepseek.data.preprocess.records import texts_of_file
from megatron_deepseek.data.text_splits import DEEPSEEK_V3, PUNCTUATION
from megatron_deepseek.data.tokenizer import SPECIAL_TOKENS
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROGRAM = "train_tokenizer.py"
SMALLEST = 256 + len(SPECIAL_TOKENS)


def read_texts(input_files: list[InputFile], key: str, max_bytes: int) -> Iterator[str]:
    """Yield the texts in their order, until one would exceed `max_bytes` in all; the first one always."""
    size = 0
    for input_file in input_files:
        for text in texts_of_file(input_file, key):
            if size and size + len(text.encode()) > max_bytes:
                return
            size += len(text.encode())
            yield text


def train(texts: Iterable[str], vocab_size: int, isolate_punctuation: bool = False) -> "Tokenizer":
    """Return a tokenizer of at most `vocab_size` entries: fewer where the text has no more pairs to merge.

    `isolate_punctuation` makes every punctuation mark and digit a token of its own, so that a small vocabulary holds
    words and not their combinations with marks.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated")
         for pattern in ((PUNCTUATION,) if isolate_punctuation else ()) + DEEPSEEK_V3]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: "Tokenizer", output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as file:
        file.write(tokenizer.to_str(pretty=True))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Train a byte-level BPE tokenizer.")
    parser.add_argument("--input", nargs="+", required=True,
                        help="files, globs or directories, as in preprocess_data.py")
    parser.add_argument("--output", type=values.path, required=True, help="the tokenizer.json to write")
    parser.add_argument("--json-key", default="text", help="the key that holds the text (default: %(default)s)")
    parser.add_argument("--vocab-size", type=values.positive_int, default=8192,
                        help="entries in all, special tokens included (default: %(default)s)")
    parser.add_argument("--isolate-punctuation", action="store_true",
                        help="every punctuation mark and digit by itself: for code and a small vocabulary")
    parser.add_argument("--max-bytes", type=values.positive_int, default=100_000_000,
                        help="most bytes of text to learn from, taken from the start (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.vocab_size < SMALLEST:
        parser.error(f"--vocab-size {arguments.vocab_size}: {SMALLEST} are needed for the bytes and special tokens")
    return arguments


def run(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    refuse_directory("--output", arguments.output)
    start = time.perf_counter()
    texts = list(read_texts(find_inputs(arguments.input), arguments.json_key, arguments.max_bytes))
    if not texts:
        raise ValueError(f"--input {' '.join(arguments.input)}: no text there")
    tokenizer = train(texts, arguments.vocab_size, arguments.isolate_punctuation)
    save(tokenizer, arguments.output)
    size = tokenizer.get_vocab_size()
    short = "" if size == arguments.vocab_size else f" (the text gives no more; --vocab-size {arguments.vocab_size})"
    read = sum(len(text.encode()) for text in texts)
    print(f"{arguments.output}: {size} entries{short} from {len(texts)} texts, {read / 1e6:.1f} MB, "
          f"in {time.perf_counter() - start:.1f} s")
    return 0


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv))

