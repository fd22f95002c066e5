"""Megatron's indexed datasets: a .bin of token ids and an .idx (index_file.py) that says where each sequence lies.

The format is megatron-core's. This file adds what its reader and writer leave out: a message that says what is wrong
with a file, where it fails in numpy or reads rubbish; and a writer that, killed, leaves no half file that looks whole.
"""

import contextlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.data.index_file import ENTRIES_PER_CHUNK, HEADER, MAGIC, TOKEN_DTYPES, IndexFile, open_index
from megatron_deepseek.data.naming import naming

TOKENS_PER_CHUNK = 1 << 20
MOST_TOKENS_SCANNED = 1 << 28


@dataclass(frozen=True)
class IndexedFile:
    """A checked pair of files; `lengths` int32 [S] and `ids` [tokens] are mapped, not read."""

    prefix: str
    lengths: np.ndarray
    ids: np.ndarray


def open_indexed(prefix: str, argument: str) -> IndexedFile:
    """Open both files and check them against each other. Raise ValueError, begun by `argument`, for a fault."""
    index = open_index(prefix, argument)
    try:
        _check_bounds(index)
    except ValueError as error:
        raise ValueError(f"{argument} {prefix}: {error}") from error
    tokens = os.path.getsize(prefix + ".bin") // index.token_dtype.itemsize
    ids = np.memmap(prefix + ".bin", index.token_dtype, "r", 0, tokens) if tokens else np.empty(0, index.token_dtype)
    return IndexedFile(prefix, index.map(index.lengths), ids)


def _check_bounds(index: IndexFile):
    """Raise ValueError where something that training reads lies outside the .bin.

    `index_damage` looks at every entry, and closer.
    """
    size, itemsize, end = os.path.getsize(index.prefix + ".bin"), index.token_dtype.itemsize, 0
    if index.num_sequences == 0:
        raise ValueError("it holds no sequences")
    for lengths, pointers in zip(index.read(index.lengths), index.read(index.pointers)):
        if lengths.min() < 0 or pointers.min() < 0:
            raise ValueError(f"{index.path} is damaged: negative lengths or offsets")
        sizes = lengths.astype(np.int64) * itemsize
        last = int((pointers + sizes).argmax()) if pointers.max() <= size else int(pointers.argmax())
        end = max(end, int(pointers[last]) + int(sizes[last]))
    if size < end:
        raise ValueError(f"{index.prefix}.bin is truncated: {size} bytes, where {index.path} points at {end}")
    first, last = np.memmap(index.path, "<i8", "r", index.documents.offset, index.num_document_entries)[[0, -1]]
    if first != 0 or last != index.num_sequences:
        raise ValueError(f"{index.path} is damaged: its documents are the sequences {first} to {last}, but there are "
                         f"{index.num_sequences}")


def token_range(file: IndexedFile, most_tokens: int = MOST_TOKENS_SCANNED) -> tuple[int, int]:
    """Return the least and the greatest id, read in chunks.

    In a file of more than `most_tokens` only as many are read, in chunks that are spread evenly over it.
    """
    chunks = -(-len(file.ids) // TOKENS_PER_CHUNK)
    scanned = min(chunks, -(-most_tokens // TOKENS_PER_CHUNK))
    least, greatest = [], []
    for index in np.linspace(0, chunks - 1, scanned).astype(np.int64):
        chunk = file.ids[index * TOKENS_PER_CHUNK:(index + 1) * TOKENS_PER_CHUNK]
        least.append(int(chunk.min()))
        greatest.append(int(chunk.max()))
    return min(least, default=0), max(greatest, default=0)


class IndexedWriter:
    """Writes `{prefix}.bin.tmp` as documents come, then `{prefix}.idx.tmp`; `publish` renames both.

    The bytes are those of megatron-core's IndexedDatasetBuilder (a test compares them), without its 3 to 7 s import.
    """

    def __init__(self, prefix: str, dtype):
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self.prefix, self.dtype = prefix, np.dtype(dtype).newbyteorder("<")
        self.lengths, self.documents = array("i"), array("q", [0])
        self.file = open(prefix + ".bin.tmp", "wb")

    @property
    def num_tokens(self) -> int:
        return self.file.tell() // self.dtype.itemsize

    def add(self, ids: np.ndarray, sequence_lengths):
        """Write documents: all their ids, and for each the lengths of its sequences (none in an empty document)."""
        self.extend(ids)
        self.end_documents(sequence_lengths)

    def extend(self, ids: np.ndarray):
        """Write ids of a document that is not complete yet: `end_documents` or `rewind` must follow."""
        with naming(self.file.name):
            self.file.write(ids.astype(self.dtype, copy=False).data)

    def end_documents(self, sequence_lengths):
        for lengths in sequence_lengths:
            self.lengths.extend(lengths)
            self.documents.append(len(self.lengths))

    def rewind(self, num_tokens: int):
        """Forget what was written after the first `num_tokens`, which ended a document."""
        self.file.seek(num_tokens * self.dtype.itemsize)
        self.file.truncate()

    def finish(self):
        with naming(self.file.name):
            self.file.close()
        with naming(self.prefix + ".idx.tmp"):
            self._write_index()

    def _write_index(self):
        """Write the sections in pieces: whole copies would be most of the memory of tens of millions of documents."""
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self.dtype)
        begin = 0
        with open(self.prefix + ".idx.tmp", "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(self.lengths), len(self.documents)))
            for lengths in _pieces(self.lengths):
                file.write(lengths.astype("<i4", copy=False).data)
            for lengths in _pieces(self.lengths):
                ends = np.cumsum(lengths, dtype="<i8") + begin
                file.write(((ends - lengths) * self.dtype.itemsize).data)
                begin = ends[-1]
            for documents in _pieces(self.documents):
                file.write(documents.astype("<i8", copy=False).data)

    def publish(self):
        publish(self.prefix)

    def discard(self):
        with contextlib.suppress(OSError):  # closing writes what is left; a full disk has been reported already
            self.file.close()
        discard(self.prefix)


def _pieces(entries: array) -> Iterator[np.ndarray]:
    """Yield views of an array, ENTRIES_PER_CHUNK of its entries each."""
    whole = np.asarray(entries)
    yield from (whole[at:at + ENTRIES_PER_CHUNK] for at in range(0, len(whole), ENTRIES_PER_CHUNK))


def publish(prefix: str):
    """Rename `{prefix}.bin.tmp` and `.idx.tmp` to .bin and .idx.

    A dataset is whole only with its .idx, so an older .idx is removed first and the new one comes last.
    """
    Path(prefix + ".idx").unlink(missing_ok=True)
    os.replace(prefix + ".bin.tmp", prefix + ".bin")
    os.replace(prefix + ".idx.tmp", prefix + ".idx")


def discard(prefix: str):
    """Remove what was written aside and not published."""
    for suffix in (".bin.tmp", ".idx.tmp"):
        Path(prefix + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(prefixes, dtype):
    """Yield an `IndexedWriter` for each of `prefixes`; their files appear only if the block succeeds.

    A kill at any moment leaves the old dataset, one without its .idx, or the new one, never a mixture taken for whole.
    """
    writers = []
    try:
        for prefix in prefixes:
            writers.append(IndexedWriter(prefix, dtype))
        yield writers
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.discard()
