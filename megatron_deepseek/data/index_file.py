"""The .idx of an indexed dataset: its header, its sections in bounded memory, and everything that can be wrong with it.

Little-endian: magic (9 bytes), uint64 version 1, uint8 dtype code, uint64 S sequences, uint64 D entries of the document
index; then int32[S] sequence lengths, int64[S] byte offsets into the .bin ("pointers"), int64[D] first sequence of each
document and the end, and, only in multimodal datasets, int8[S] modes.

A header is believed only where it fits the size of the file, and no section is ever read whole.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
ENTRIES_PER_CHUNK = 1 << 18


@dataclass(frozen=True)
class Section:
    """An array within the file: `count` entries of `dtype` from byte `offset` on."""

    dtype: np.dtype
    offset: int
    count: int


@dataclass(frozen=True)
class IndexFile:
    """The header of `{prefix}.idx`, which fits the size of that file. The sections are not checked yet."""

    prefix: str
    token_dtype: np.dtype
    num_sequences: int
    num_document_entries: int
    has_modes: bool

    @property
    def path(self) -> str:
        return self.prefix + ".idx"

    @property
    def lengths(self) -> Section:
        return Section(np.dtype("<i4"), HEADER.size, self.num_sequences)

    @property
    def pointers(self) -> Section:
        return Section(np.dtype("<i8"), HEADER.size + 4 * self.num_sequences, self.num_sequences)

    @property
    def documents(self) -> Section:
        return Section(np.dtype("<i8"), HEADER.size + 12 * self.num_sequences, self.num_document_entries)

    @property
    def modes(self) -> Section:
        after_documents = self.documents.offset + 8 * self.num_document_entries
        return Section(np.dtype("i1"), after_documents, self.num_sequences if self.has_modes else 0)

    def map(self, section: Section) -> np.ndarray:
        """Return the section as an array, mapped and not read."""
        if not section.count:
            return np.empty(0, section.dtype)
        return mapped(self.path, section.dtype, section.offset, section.count)

    def read(self, section: Section, first: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """Yield the entries [first, end) of the section, by default all, in chunks of ENTRIES_PER_CHUNK."""
        end = section.count if end is None else end
        assert 0 <= first <= end <= section.count, (first, end, section)
        with open(self.path, "rb") as file:
            file.seek(section.offset + first * section.dtype.itemsize)
            for begin in range(first, end, ENTRIES_PER_CHUNK):
                wanted = min(ENTRIES_PER_CHUNK, end - begin)
                chunk = np.fromfile(file, section.dtype, wanted)
                if len(chunk) < wanted:
                    raise ValueError(f"{self.path} was cut while it was read")
                yield chunk

    def at(self, section: Section, place: int) -> int:
        """Return one entry."""
        return int(next(self.read(section, place, place + 1))[0])


def mapped(path, dtype, offset: int, count: int) -> np.ndarray:
    """Return a plain array over the file: indexing it costs half of indexing a np.memmap."""
    return np.memmap(path, dtype, "r", offset, count).view(np.ndarray)


def open_index(prefix: str, argument: str) -> IndexFile:
    """Return the header of a dataset whose two files exist, checked against the size of the .idx.

    Raise ValueError otherwise: it begins with `argument` and the prefix, and names the file and what is wrong with it.
    """
    def refuse(why: str):
        return ValueError(f"{argument} {prefix}: {why}")

    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise refuse(f"{prefix}{suffix} does not exist" + _hint(prefix))
    try:
        size = os.path.getsize(prefix + ".idx")
        with open(prefix + ".idx", "rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise refuse(f"{prefix}.idx cannot be read: {error.strerror}") from error
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
        raise refuse(f"{prefix}.idx is truncated: {size} bytes, {expected} for its {sequences} sequences and "
                     f"{documents} document entries")
    if size not in (expected, expected + sequences):
        raise refuse(f"{prefix}.idx is damaged: {size} bytes, {expected} for its {sequences} sequences and "
                     f"{documents} document entries")
    if documents == 0:
        raise refuse(f"{prefix}.idx is damaged: its document index is empty, without even the 0 that begins it")
    dtype = np.dtype(TOKEN_DTYPES[code]).newbyteorder("<")
    return IndexFile(prefix, dtype, sequences, documents, has_modes=size > expected)


def check_output_prefix(prefix: str):
    """Raise ValueError where `prefix` can only be a directory, such as `data/`.

    A prefix that is also the name of a directory is allowed: `data/web` beside `data/web/` gives
    `data/web_text_document.bin`.
    """
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ValueError(f"--output-prefix {prefix}: that is a directory; give the beginning of the files' names too, "
                         f"as in {os.path.join(prefix, 'corpus')}")


def _hint(prefix: str) -> str:
    """Return what was probably meant by a prefix without files, as the end of a message; "" if unknown."""
    if Path(prefix).is_dir():
        found = sorted(path.stem for path in Path(prefix).glob("*.idx"))
        which = (f"the datasets in it are {', '.join(os.path.join(prefix, name) for name in found[:5])}"
                 f"{', ...' * (len(found) > 5)}" if found else "there is no .idx in it")
        return f": {prefix} is a directory, and {which}"
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        return "; give the prefix, without .bin or .idx"
    if Path(prefix + "_text_document.idx").is_file():
        return f"; did you mean {prefix}_text_document?"
    return ""


def index_damage(index: IndexFile, scanned=lambda num_bytes: None) -> Iterator[str]:
    """Yield everything that is wrong with the sections, each fault by file and position.

    A dataset is sound as Megatron-LM writes it: its sequences fill the .bin end to end, its documents are in order from
    the first sequence to the last. `scanned` is called with the bytes of every chunk of the .idx.
    """
    yield from _sequence_damage(index, os.path.getsize(index.prefix + ".bin"), scanned)
    yield from _document_damage(index, scanned)
    for first, modes in _numbered(index.read(index.modes)):
        for place in np.flatnonzero(modes < 0):
            yield f"{index.path}: sequence {first + place} has the mode {modes[place]}"
        scanned(modes.nbytes)


def _sequence_damage(index: IndexFile, bin_size: int, scanned) -> Iterator[str]:
    end, itemsize = 0, index.token_dtype.itemsize
    for (first, lengths), pointers in zip(_numbered(index.read(index.lengths)), index.read(index.pointers)):
        for place in np.flatnonzero(lengths < 0):
            yield f"{index.path}: sequence {first + place} has the length {lengths[place]}"
        sizes = lengths.astype(np.int64) * itemsize
        outside = (pointers < 0) | (pointers > bin_size - sizes)
        for place in np.flatnonzero(outside):
            yield (f"{index.path}: sequence {first + place} is at bytes {pointers[place]} to "
                   f"{int(pointers[place]) + int(sizes[place])}, outside the {bin_size} bytes of {index.prefix}.bin")
        ends = pointers + sizes  # wraps round silently, where they are outside
        before = np.concatenate(([end], ends[:-1]))
        for place in np.flatnonzero((pointers != before) & ~outside):
            yield (f"{index.path}: sequence {first + place} begins at byte {pointers[place]}, and the one before it "
                   f"ends at {before[place]}")
        end = int(ends[-1])
        scanned(lengths.nbytes + pointers.nbytes)
    if end != bin_size:
        yield f"{index.prefix}.bin holds {bin_size} bytes, but its last sequence in {index.path} ends at {end}"


def _document_damage(index: IndexFile, scanned) -> Iterator[str]:
    before = 0
    for first, entries in _numbered(index.read(index.documents)):
        if first == 0 and entries[0] != 0:
            yield f"{index.path}: the first document begins at sequence {entries[0]}, not at 0"
        previous = np.concatenate(([before], entries[:-1]))
        for place in np.flatnonzero((entries < previous) | (entries > index.num_sequences)):
            yield (f"{index.path}: entry {first + place} of the document index is {entries[place]}, which is not "
                   f"between the one before, {previous[place]}, and the {index.num_sequences} sequences")
        before = entries[-1]
        scanned(entries.nbytes)
    if before != index.num_sequences:
        yield f"{index.path}: the last document ends at sequence {before}, but there are {index.num_sequences}"


def _numbered(chunks: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each chunk with the number of its first entry."""
    first = 0
    for chunk in chunks:
        yield first, chunk
        first += len(chunk)
