"""Inspection of indexed datasets in bounded memory: statistics, ids outside a vocabulary, documents by number."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_deepseek.data.index_file import IndexFile, index_damage

TOKENS_PER_CHUNK = 1 << 20
MOST_BINS = 64
BAR_WIDTH = 30  # characters


@dataclass(frozen=True)
class LengthBin:
    """The number of `documents` of `shortest` to `longest` tokens (2^k to 2^(k+1) - 1) and their tokens in all."""

    shortest: int
    longest: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Statistics:
    """The counts of a dataset. Lengths are in tokens; `histogram` goes from the first bin in use to the last."""

    prefix: str
    dtype: str
    modes: bool
    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    shortest: int
    longest: int
    mean: float
    histogram: tuple[LengthBin, ...]


def measure(index: IndexFile) -> Statistics:
    """Return the statistics of a dataset, read from the .idx alone. Raise ValueError where it is damaged."""
    damage = next(index_damage(index), None)
    if damage is not None:
        raise ValueError(f"{damage}; 'verify' lists all that is wrong")
    documents, tokens = np.zeros(MOST_BINS, np.int64), np.zeros(MOST_BINS, np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for lengths in _document_lengths(index):
        bins = np.frexp(lengths.astype(np.float64))[1]  # 0, 1, 2-3, 4-7, ...
        np.add.at(documents, bins, 1)
        np.add.at(tokens, bins, lengths)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    total, count = int(tokens.sum()), int(documents.sum())
    held = np.flatnonzero(documents)
    histogram = tuple(LengthBin(1 << k >> 1, (1 << k) - 1, int(documents[k]), int(tokens[k]))
                      for k in range(held[0], held[-1] + 1)) if count else ()
    return Statistics(index.prefix, index.token_dtype.name, index.has_modes, count, int(documents[0]),
                      index.num_sequences, total, os.path.getsize(index.prefix + ".bin"), os.path.getsize(index.path),
                      shortest if count else 0, longest, total / count if count else 0.0, histogram)


def _document_lengths(index: IndexFile) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, in chunks: the end of its last sequence minus the begin of its first."""
    pointers, end = index.map(index.pointers), os.path.getsize(index.prefix + ".bin")
    before = 0
    for entries in index.read(index.documents, 1):
        ends = np.full(len(entries), end, np.int64)
        inside = entries < index.num_sequences
        ends[inside] = pointers[entries[inside]]
        yield np.diff(ends, prepend=before) // index.token_dtype.itemsize
        before = ends[-1]


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`: `damage`, at most as many faults as asked for, and the least and greatest id.

    Where the .idx is damaged no id is read, and both are 0.
    """

    damage: tuple[str, ...]
    least: int
    greatest: int


def verify(index: IndexFile, vocab_size: int | None, most: int, scanned=lambda num_bytes: None) -> Verdict:
    """Check every entry of the .idx and every id of the .bin, until `most` faults are found.

    Without `vocab_size` an id is wrong if it is negative. `scanned` is called with the bytes of each chunk of both
    files.
    """
    damage = tuple(itertools.islice(index_damage(index, scanned), most))
    if damage:
        return Verdict(damage, 0, 0)
    seen = []
    damage = tuple(itertools.islice(_id_damage(index, vocab_size, seen, scanned), most))
    return Verdict(damage, min((low for low, _ in seen), default=0), max((high for _, high in seen), default=0))


def _id_damage(index: IndexFile, vocab_size: int | None, seen: list[tuple[int, int]], scanned) -> Iterator[str]:
    """Yield a line for each id outside the vocabulary; `seen` gets the least and greatest id of each chunk."""
    path = index.prefix + ".bin"
    limit = np.iinfo(index.token_dtype).max + 1 if vocab_size is None else vocab_size
    asked = "is negative" if vocab_size is None else f"is outside --vocab-size {vocab_size}"
    with open(path, "rb") as file:
        for first in itertools.count(0, TOKENS_PER_CHUNK):
            ids = np.fromfile(file, index.token_dtype, TOKENS_PER_CHUNK)
            if not len(ids):
                return
            seen.append((int(ids.min()), int(ids.max())))
            if seen[-1][0] < 0 or seen[-1][1] >= limit:
                for place in np.flatnonzero((ids < 0) | (ids.astype(np.int64) >= limit)):
                    yield f"{path}: token {first + place} ({_whereabouts(index, first + place)}) {asked}: {ids[place]}"
            scanned(ids.nbytes)


def _whereabouts(index: IndexFile, token: int) -> str:
    """Return the document of a token of the .bin and the place in it, both counted from 0, for a sound dataset."""
    pointers, documents = index.map(index.pointers), index.map(index.documents)
    sequence = int(np.searchsorted(pointers, token * index.token_dtype.itemsize, "right")) - 1
    document = int(np.searchsorted(documents, sequence, "right")) - 1
    first = int(pointers[documents[document]]) // index.token_dtype.itemsize
    return f"document {document}, its token {token - first}"


@dataclass(frozen=True)
class Document:
    """A document of a dataset. `ids` are the first of its `length` tokens, as many as were asked for."""

    number: int
    num_sequences: int
    length: int
    ids: np.ndarray


def read_documents(index: IndexFile, first: int, count: int, most_tokens: int) -> Iterator[Document]:
    """Yield the documents [first, first + count) that exist. Raise ValueError where the .idx is damaged at one."""
    end = min(first + count, index.num_document_entries - 1)
    bin_size, itemsize = os.path.getsize(index.prefix + ".bin"), index.token_dtype.itemsize
    for number in range(first, end):
        begin, stop = index.at(index.documents, number), index.at(index.documents, number + 1)
        if not 0 <= begin <= stop <= index.num_sequences:
            raise ValueError(f"{index.path}: document {number} is the sequences {begin} to {stop} of "
                             f"{index.num_sequences}")
        length = sum(int(chunk.sum(dtype=np.int64)) for chunk in index.read(index.lengths, begin, stop))
        offset = index.at(index.pointers, begin) if begin < stop else 0
        if length < 0 or offset < 0 or offset + length * itemsize > bin_size:
            raise ValueError(f"{index.path}: document {number} is {length} tokens from byte {offset}, outside the "
                             f"{bin_size} bytes of {index.prefix}.bin")
        ids = np.fromfile(index.prefix + ".bin", index.token_dtype, min(length, most_tokens), offset=offset)
        yield Document(number, stop - begin, length, ids)


def describe(statistics: Statistics) -> str:
    """Return lines for a person: the counts, and a histogram of the documents' lengths."""
    s = statistics
    lines = [s.prefix,
             f"  {s.documents:,} documents ({s.empty_documents:,} empty), {s.sequences:,} sequences, "
             f"{s.tokens:,} tokens",
             f"  ids as {s.dtype}{', with modes' if s.modes else ''}; .bin {s.bin_bytes:,} bytes, .idx {s.idx_bytes:,}",
             f"  tokens in a document: {s.shortest:,} to {s.longest:,}, {s.mean:,.1f} on average"]
    if s.histogram:
        most = max(entry.documents for entry in s.histogram)
        lines.append(f"  {'tokens':>23} {'documents':>13} {'of tokens':>9}")
        for entry in s.histogram:
            lengths = f"{entry.shortest:,} to {entry.longest:,}"
            share = entry.tokens / s.tokens if s.tokens else 0
            bar = "#" * -(-BAR_WIDTH * entry.documents // most)
            lines.append(f"  {lengths:>23} {entry.documents:>13,} {share:>9.1%} {bar}")
    return "\n".join(lines)
