"""What a run did: for the screen and, in full, as JSON."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from megatron_deepseek.data.corpus.part import Summary, where
from megatron_deepseek.data.corpus.plan import Part
from megatron_deepseek.data.index_file import IndexFile, open_index

ERRORS_ON_SCREEN = 10
BAR_WIDTH = 40


@dataclass(frozen=True)
class Lengths:
    """Of one key: `longest` (document, tokens), and how many documents have 0, 1, 2-3, 4-7, ... tokens."""

    documents: int
    tokens: int
    bytes: int
    longest: tuple[int, int]
    histogram: list[int]


@dataclass(frozen=True)
class Report:
    """`keys` by JSON key; `skipped` and `notes` count documents by reason; `errors` are "file line n: why"."""

    prefixes: dict[str, list[str]]
    keys: dict[str, Lengths]
    documents: int
    tokens: int
    input_bytes: int
    chars: int
    skipped: dict[str, int]
    notes: dict[str, int]
    errors: list[str]
    tokenizer_backend: str
    parts: int
    parts_reused: int
    seconds: float

    def as_json(self) -> dict:
        return asdict(self)

    def lines(self) -> list[str]:
        made = [f"{self.documents} documents, {self.tokens} tokens in {self.seconds:.1f} s "
                f"({self.tokens / self.seconds / 1e6:.2f} M tokens/s, {self.input_bytes / self.seconds / 1e6:.1f} MB/s "
                f"of input; tokenizer: {self.tokenizer_backend})"]
        if self.parts_reused:
            made.append(f"{self.parts_reused} of {self.parts} parts were there from before")
        made += [f"skipped {count}: {reason}" for reason, count in sorted(self.skipped.items())]
        made += [f"noted {count}: {what}" for what, count in sorted(self.notes.items())]
        made += [f"  {error}" for error in self.errors[:ERRORS_ON_SCREEN]]
        if len(self.errors) > ERRORS_ON_SCREEN:
            made.append(f"  ... and {len(self.errors) - ERRORS_ON_SCREEN} more in the report")
        for key, lengths in self.keys.items():
            made += _table(key, lengths)
        return made


def _table(key: str, lengths: Lengths) -> list[str]:
    mean = lengths.tokens / max(1, lengths.documents)
    made = [f"key {key!r}: {lengths.tokens} tokens, {mean:.0f} a document, the longest {lengths.longest[1]} "
            f"(document {lengths.longest[0]}); {lengths.bytes} bytes"]
    filled = [place for place, count in enumerate(lengths.histogram) if count]
    for place in range(min(filled, default=0), max(filled, default=-1) + 1):
        count = lengths.histogram[place]
        bounds = str(place) if place < 2 else f"{1 << place - 1}-{(1 << place) - 1}"
        made.append(f"{bounds:>21} tokens {count:>10} {'#' * -(-BAR_WIDTH * count // max(lengths.histogram))}".rstrip())
    return made


def measure(prefixes: list[str]) -> Lengths:
    """The lengths of the documents of datasets in turn, read by chunks."""
    documents, tokens, longest, histogram = 0, 0, (0, 0), np.zeros(64, np.int64)
    for prefix in prefixes:
        index = open_index(prefix, "dataset")
        for lengths in _document_lengths(index):
            place = int(lengths.argmax())
            longest = max(longest, (documents + place, int(lengths[place])), key=lambda pair: pair[1])
            histogram += np.bincount(np.frexp(lengths)[1], minlength=64)
            documents, tokens = documents + len(lengths), tokens + int(lengths.sum())
    used = int(np.flatnonzero(histogram)[-1]) + 1 if histogram.any() else 0
    return Lengths(documents, tokens, tokens * index.token_dtype.itemsize, longest, histogram[:used].tolist())


def _document_lengths(index: IndexFile) -> Iterator[np.ndarray]:
    """Tokens of each document, by chunks: from where its first sequence begins to where the next one's does."""
    pointers, itemsize = index.map(index.pointers), index.token_dtype.itemsize
    total = os.path.getsize(index.prefix + ".bin") // itemsize
    before = np.empty(0, np.int64)
    for entries in index.read(index.documents):
        starts = np.full(len(entries), total, np.int64)
        inside = entries < index.num_sequences
        starts[inside] = pointers[entries[inside]] // itemsize
        lengths = np.diff(np.concatenate([before, starts]))
        if len(lengths):
            yield lengths
        before = starts[-1:]


def describe_errors(parts: list[Part], summaries: list[Summary]) -> list[str]:
    """Each error by file and line. Where a part begins inside a file, the lines of the parts before it are known."""
    described, counted = [], {}
    for part, summary in zip(parts, summaries, strict=True):
        before = []
        for segment, lines in zip(part.segments, summary.lines):
            path = segment.source.index
            before.append(counted.get(path, 0) if segment.lines_before is None else segment.lines_before)
            counted[path] = before[-1] + lines
        described += [f"{where(part.segments[segment], line, before[segment])}: {detail}"
                      for segment, line, _, detail in summary.errors]
    return described
