"""The command line of tools/make_corpus.py, which makes a JSONL corpus of the running Python's standard library.

Every machine with CPython >= 3.10 has some 10 MB of them. Each line is a document, {"text", "source"}: a topic of
Python's reference manual that `pydoc` shows, or a whole .py file. A document appears once, so that text held out for
validation was not seen in training. The order is fixed by a hash of its name, so that a corpus split by position (as
--split does) holds documents of every kind in each part. The same Python gives the same bytes.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.data.preprocess.files import refuse_directory, written_aside
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

# Installed packages and tests are not the library; the others are tables (code pages, the manual as string literals,
# build variables with this machine's paths) that would teach a model nothing but numbers.
EXCLUDED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "*_test", "lib-dynload",
            "config-*", "encodings", "pydoc_data", "_sysconfigdata*", "_sysconfig_vars*", "*.bundle")
FEWEST_BYTES = 1_000_000
PROGRAM = "make_corpus.py"


def manual_documents() -> Iterator[tuple[str, str]]:
    """Yield (source, text) of each topic of the manual that CPython carries for `pydoc`; none where it is absent."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        yield f"manual/{name}", text


def is_excluded(relative: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(part, pattern) for part in relative.parts for pattern in patterns)


def source_documents(library: Path, excluded: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of each .py file under `library` that can be decoded as it declares."""
    for folder, folders, files in os.walk(library):
        here = Path(folder).relative_to(library)
        folders[:] = [name for name in folders if not is_excluded(here / name, excluded)]
        for name in files:
            if not name.endswith(".py") or is_excluded(here / name, excluded):
                continue
            try:
                with tokenize.open(Path(folder) / name) as file:
                    yield f"lib/{(here / name).as_posix()}", file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue


def choose(documents: Iterable[tuple[str, str]], max_bytes: int) -> tuple[list[tuple[str, str]], int]:
    """Return non-empty documents of at most `max_bytes` of UTF-8, ordered by hashes of their names, and their bytes."""
    def by_hash(document):
        return hashlib.sha256(document[0].encode()).digest()

    chosen, size = [], 0
    for source, text in sorted(documents, key=by_hash):
        length = len(text.encode("utf-8", "replace"))
        if text.strip() and size + length <= max_bytes:
            chosen.append((source, text))
            size += length
    return chosen, size


def write_corpus(documents: Iterable[tuple[str, str]], output: Path) -> None:
    """Write the corpus aside and rename it, so that a killed run leaves no half corpus behind."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as file:
        for source, text in documents:
            file.write(json.dumps({"text": text, "source": source}) + "\n")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM,
                           description="Make a JSONL corpus of the running Python's standard library.")
    parser.add_argument("--output", type=values.path, required=True, help="the .jsonl file to write")
    parser.add_argument("--max-bytes", type=values.positive_int, default=16_000_000,
                        help="most bytes of text (default: %(default)s)")
    parser.add_argument("--exclude", nargs="*", default=EXCLUDED, metavar="PATTERN",
                        help="names of files and folders to leave out, in place of the default: %(default)s")
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    refuse_directory("--output", arguments.output)
    start = time.perf_counter()
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [*manual_documents(), *source_documents(library, arguments.exclude)]
    documents, size = choose(found, arguments.max_bytes)
    if size < min(FEWEST_BYTES, arguments.max_bytes // 2):
        raise ValueError(f"only {size} bytes of text under {library}, the standard library of {sys.executable}; "
                         f"use a Python that comes with its sources")
    write_corpus(documents, arguments.output)
    manual = sum(source.startswith("manual/") for source, _ in documents)
    print(f"{arguments.output}: {len(documents)} documents ({manual} of Python {sys.version.split()[0]}'s manual, "
          f"{len(documents) - manual} sources), {size / 1e6:.1f} MB of text in {time.perf_counter() - start:.1f} s")
    return 0


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv))

