"""Megatron's indexed datasets: a .bin of token ids and an .idx that says where each sequence lies.

The .idx, little-endian: magic (9 bytes), uint64 version 1, uint8 dtype code, uint64 S sequences, uint64 D entries of
the document index; then int32[S] sequence lengths, int64[S] byte offsets into the .bin, int64[D] first sequence of
each document and the end, and, only in multimodal datasets, int8[S] modes.

In training megatron-core reads them. Here is what it leaves out: saying what is wrong with a file instead of failing
in numpy or reading rubbish, and writing so that a kill leaves no half file that looks whole.
"""

import contextlib
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}

TOKENS_PER_CHUNK = 1 << 20
MOST_TOKENS_SCANNED = 1 << 28


@dataclass(frozen=True)
class IndexedFile:
    """A checked pair of files; `lengths` int32 [S] and `ids` [tokens] are mapped, not read."""

    prefix: str
    lengths: np.ndarray
    ids: np.ndarray


def open_indexed(prefix: str, argument: str) -> IndexedFile:
    """Check both files against the header and each other; ValueError says what is wrong, after `argument`."""
    def refuse(why: str):
        return ValueError(f"{argument} {prefix}: {why}")

    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise refuse(f"{prefix}{suffix} does not exist" + _hint(prefix))
    dtype, sequences, documents = _read_header(prefix, refuse)
    if sequences == 0:
        raise refuse("it holds no sequences")
    lengths = np.memmap(prefix + ".idx", np.dtype("<i4"), "r", HEADER.size, sequences)
    offsets = np.memmap(prefix + ".idx", np.dtype("<i8"), "r", HEADER.size + 4 * sequences, sequences)
    size, itemsize = os.path.getsize(prefix + ".bin"), np.dtype(dtype).itemsize
    end = int((offsets + lengths.astype(np.int64) * itemsize).max())
    if lengths.min() < 0 or offsets.min() < 0:
        raise refuse(f"{prefix}.idx is damaged: negative lengths or offsets")
    if size < end:
        raise refuse(f"{prefix}.bin is truncated: {size} bytes, where {prefix}.idx points at {end}")
    tokens = size // itemsize
    ids = np.memmap(prefix + ".bin", dtype, "r", 0, tokens) if tokens else np.empty(0, dtype)
    return IndexedFile(prefix, lengths, ids)


def _read_header(prefix: str, refuse):
    size = os.path.getsize(prefix + ".idx")
    with open(prefix + ".idx", "rb") as file:
        header = file.read(HEADER.size)
    if not header.startswith(MAGIC[:len(header)]) or not header:
        raise refuse(f"{prefix}.idx is no index of this format: it begins with {header[:9]!r}, not {MAGIC!r}")
    if len(header) < HEADER.size:
        raise refuse(f"{prefix}.idx is truncated: {size} bytes, its header alone has {HEADER.size}")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1:
        raise refuse(f"{prefix}.idx has version {version}; only version 1 is known")
    if code not in TOKEN_DTYPES:
        raise refuse(f"{prefix}.idx has dtype code {code}, which is no integer type of token ids")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size < expected:
        raise refuse(f"{prefix}.idx is truncated: {size} bytes, {expected} for its {sequences} sequences")
    if size not in (expected, expected + sequences):
        raise refuse(f"{prefix}.idx is damaged: {size} bytes, {expected} for its {sequences} sequences")
    return TOKEN_DTYPES[code], sequences, documents


def _hint(prefix: str) -> str:
    """What is often meant instead."""
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        return "; give the prefix, without .bin or .idx"
    if Path(prefix + "_text_document.idx").is_file():
        return f"; did you mean {prefix}_text_document?"
    return ""


def token_range(file: IndexedFile) -> tuple[int, int]:
    """The least and the greatest id, by chunks; past 2^28 tokens of chunks spread evenly over the file."""
    chunks = -(-len(file.ids) // TOKENS_PER_CHUNK)
    scanned = min(chunks, MOST_TOKENS_SCANNED // TOKENS_PER_CHUNK)
    least, greatest = [], []
    for index in np.linspace(0, chunks - 1, scanned).astype(np.int64):
        chunk = file.ids[index * TOKENS_PER_CHUNK:(index + 1) * TOKENS_PER_CHUNK]
        least.append(int(chunk.min()))
        greatest.append(int(chunk.max()))
    return min(least, default=0), max(greatest, default=0)


class IndexedWriter:
    """Writes `{prefix}.bin.tmp` as documents come, then `{prefix}.idx.tmp`; `publish` gives both their names.

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
        """Documents end to end: their ids, and for each the lengths of its sequences (none in an empty document)."""
        self.file.write(ids.astype(self.dtype, copy=False).data)
        for lengths in sequence_lengths:
            self.lengths.extend(lengths)
            self.documents.append(len(self.lengths))

    def finish(self):
        self.file.close()
        lengths = np.array(self.lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self.dtype)
        with open(self.prefix + ".idx.tmp", "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(self.documents)))
            file.write(lengths.data)
            file.write((ends - lengths * np.int64(self.dtype.itemsize)).data)
            file.write(np.array(self.documents, "<i8").data)

    def publish(self):
        """A dataset is whole only with its .idx: an older one goes first and the new one comes last."""
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        os.replace(self.prefix + ".bin.tmp", self.prefix + ".bin")
        os.replace(self.prefix + ".idx.tmp", self.prefix + ".idx")

    def discard(self):
        self.file.close()
        for suffix in (".bin.tmp", ".idx.tmp"):
            Path(self.prefix + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(prefixes, dtype):
    """An `IndexedWriter` for each of `prefixes`, whose files appear only if the block succeeds.

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
