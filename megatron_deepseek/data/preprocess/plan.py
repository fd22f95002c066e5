"""The plan of the work: the input cut into parts, each of which is read, tokenised and kept by itself.

A plain JSONL file is cut at any byte, as a line belongs to the part in which it begins. Many small files make one
part. A compressed file larger than a part, and standard input, cannot be entered in the middle: such a stream is
decompressed once, here, and only the parts that are being worked on are spooled to disk.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_deepseek.data.naming import naming
from megatron_deepseek.data.preprocess.inputs import STANDARD_INPUT, InputFile
from megatron_deepseek.data.preprocess.streams import DamagedStream, open_stream

LEAST_PART_BYTES = 1 << 21
MOST_PART_BYTES = 1 << 26
PARTS_PER_WORKER = 8
MOST_FILES_PER_PART = 256
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Segment:
    """The records of `input_file` that begin in [start, end): bytes after decompression, row groups of parquet.

    `end` None is the end of the file. `size` counts stored bytes, for the progress. A `spool` is a file of exactly
    these bytes. `lines_before` is None where nobody has counted. `damage` says why a damaged stream ends here.
    """

    input_file: InputFile
    start: int = 0
    end: int | None = None
    size: int = 0
    spool: str | None = None
    lines_before: int | None = 0
    damage: str | None = None


@dataclass(frozen=True)
class Part:
    """A piece of the work. `checksum` is the CRC-32 of a spool, which has no file with a time and size to compare."""

    number: int
    segments: tuple[Segment, ...]
    checksum: int | None = None

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def name(self) -> str:
        return f"{self.number:08d}"


def default_part_bytes(input_files: list[InputFile], workers: int) -> int:
    """Return a part size that gives each of all `workers` several parts, so that they finish together.

    No part is smaller than LEAST_PART_BYTES or larger than MOST_PART_BYTES.
    """
    wanted = sum(input_file.size for input_file in input_files) // (workers * PARTS_PER_WORKER)
    return min(max(wanted, LEAST_PART_BYTES), MOST_PART_BYTES)


def plan_parts(input_files: list[InputFile], part_bytes: int, text_unit: str, spool_path: Callable[[int], str | None],
               ) -> Iterator[Part]:
    """Yield the parts, the same ones each time.

    `spool_path` gives the file for the spool of a part, None for a part that is not made here.
    """
    number, gathered = 0, []
    for input_file in input_files:
        if _is_stream(input_file, part_bytes):
            if gathered:
                yield Part(number, tuple(gathered))
                number, gathered = number + 1, []
            for part in _stream_parts(input_file, part_bytes, number, spool_path):
                yield part
                number = part.number + 1
            continue
        for segment in _segments(input_file, part_bytes, text_unit):
            gathered.append(segment)
            if sum(each.size for each in gathered) >= part_bytes or len(gathered) == MOST_FILES_PER_PART:
                yield Part(number, tuple(gathered))
                number, gathered = number + 1, []
    if gathered:
        yield Part(number, tuple(gathered))


def _is_stream(input_file: InputFile, part_bytes: int) -> bool:
    """Return whether the file can only be read from its begin. A text file that is one document has nothing to cut."""
    return input_file.path == STANDARD_INPUT or (input_file.compression is not None and input_file.size > part_bytes
                                                 and input_file.format == "jsonl")


def _segments(input_file: InputFile, part_bytes: int, text_unit: str) -> Iterator[Segment]:
    if input_file.size > part_bytes and input_file.format == "parquet":
        yield from _row_group_segments(input_file, part_bytes)
    elif input_file.size > part_bytes and input_file.is_splittable(text_unit):
        for start in range(0, input_file.size, part_bytes):
            end = min(start + part_bytes, input_file.size)
            yield Segment(input_file, start, end, end - start, lines_before=None if start else 0)
    else:
        yield Segment(input_file, size=input_file.size)


def _row_group_segments(input_file: InputFile, part_bytes: int) -> Iterator[Segment]:
    """Yield runs of row groups. A file that pyarrow cannot read stays whole: its reader reports the damage."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(input_file.path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        yield Segment(input_file, size=input_file.size)
        return
    first, scale = 0, input_file.size / max(1, sum(sizes))  # total_byte_size is before compression
    for group in range(len(sizes)):
        size = int(sum(sizes[first:group + 1]) * scale)
        if size >= part_bytes or group == len(sizes) - 1:
            yield Segment(input_file, first, group + 1, size)
            first = group + 1


def _stream_parts(input_file: InputFile, part_bytes: int, number: int, spool_path) -> Iterator[Part]:
    spooler = _Spooler(input_file, part_bytes)
    while True:
        part = spooler.next_part(number, spool_path(number))
        if part is None:
            return
        yield part
        number += 1


class _Spooler:
    """Cuts one stream at line ends, at least `part_bytes` apart."""

    def __init__(self, input_file: InputFile, part_bytes: int):
        self.input_file, self.part_bytes = input_file, part_bytes
        self.stream = (open_stream(input_file.path, input_file.compression) if input_file.path != STANDARD_INPUT
                       else open(0, "rb", buffering=BLOCK_BYTES, closefd=False))
        self.carried = b""
        self.position = self.lines = self.stored = 0
        self.damage = None
        self.at_end = False

    def next_part(self, number: int, path: str | None) -> Part | None:
        """Return the next part, None at the end of the stream. Its bytes go to `path` if one is given."""
        if self.at_end and not self.carried:
            return None
        size = checksum = lines = 0
        with naming(path or os.devnull), open(path or os.devnull, "wb") as spool:
            for block in self._blocks():
                spool.write(block)
                checksum, size, lines = zlib.crc32(block, checksum), size + len(block), lines + block.count(b"\n")
        stored = self._stored_bytes(size)
        segment = Segment(self.input_file, self.position, self.position + size, stored - self.stored, path, self.lines)
        self.position, self.lines, self.stored = self.position + size, self.lines + lines, stored
        if self.at_end and not self.carried and self.damage is not None:
            segment = replace(segment, damage=self.damage)
        return Part(number, (segment,), checksum) if size or segment.damage else None

    def _blocks(self) -> Iterator[bytes]:
        """Yield blocks up to the first line end at or after `part_bytes`; the rest is carried to the next part."""
        size = 0
        while True:
            block, self.carried = self.carried or self._read(), b""
            if not block:
                return
            end = block.find(b"\n", max(0, self.part_bytes - size - 1))
            if size + len(block) >= self.part_bytes and end >= 0:
                self.carried = block[end + 1:]
                yield block[:end + 1]
                return
            size += len(block)
            yield block

    def _read(self) -> bytes:
        if self.at_end:
            return b""
        try:
            block = self.stream.read1(BLOCK_BYTES)
        except (DamagedStream, OSError) as error:
            self.damage, block = str(error), b""
        self.at_end = not block
        return block

    def _stored_bytes(self, size: int) -> int:
        if self.input_file.path == STANDARD_INPUT:
            return self.position + size
        return os.lseek(self.stream.raw.fileno(), 0, os.SEEK_CUR)
