"""The input as parts: runs of it that are read, tokenised and kept each by itself.

A plain JSONL file is cut at any byte, as a line belongs to the part in which it begins. Many small files make one
part. A compressed file larger than a part, and standard input, cannot be entered in the middle: such a stream is
decompressed once, here, and its parts are spooled to disk, as many as are being worked on.
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
    """The records of `source` that begin in [start, end): bytes after decompression, row groups of parquet.

    `end` None is the end of the file. `size` counts stored bytes, for the progress. A `spool` holds exactly these
    bytes. `lines_before` is None where nobody has counted. `damage` says why a stream ends here before its time.
    """

    source: InputFile
    start: int = 0
    end: int | None = None
    size: int = 0
    spool: str | None = None
    lines_before: int | None = 0
    damage: str | None = None


@dataclass(frozen=True)
class Part:
    """`checksum` is the CRC-32 of a spool: of what cannot be recognised by its file's time and size."""

    number: int
    segments: tuple[Segment, ...]
    checksum: int | None = None

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def name(self) -> str:
        return f"{self.number:08d}"


def default_part_bytes(sources: list[InputFile], workers: int) -> int:
    """Several parts for each of all `workers`, so that they finish together, but neither tiny nor huge ones."""
    wanted = sum(source.size for source in sources) // (workers * PARTS_PER_WORKER)
    return min(max(wanted, LEAST_PART_BYTES), MOST_PART_BYTES)


def plan_parts(sources: list[InputFile], part_bytes: int, text_unit: str, spool_path: Callable[[int], str | None],
               ) -> Iterator[Part]:
    """The same parts each time. `spool_path` gives where a part's spool goes; None: this part is not made here."""
    number, gathered = 0, []
    for source in sources:
        if _is_stream(source, part_bytes):
            if gathered:
                yield Part(number, tuple(gathered))
                number, gathered = number + 1, []
            for part in _stream_parts(source, part_bytes, number, spool_path):
                yield part
                number = part.number + 1
            continue
        for segment in _segments(source, part_bytes, text_unit):
            gathered.append(segment)
            if sum(each.size for each in gathered) >= part_bytes or len(gathered) == MOST_FILES_PER_PART:
                yield Part(number, tuple(gathered))
                number, gathered = number + 1, []
    if gathered:
        yield Part(number, tuple(gathered))


def _is_stream(source: InputFile, part_bytes: int) -> bool:
    """A text file that is one document is no stream: there is nothing to cut."""
    return source.path == STANDARD_INPUT or (source.compression is not None and source.size > part_bytes
                                             and source.format == "jsonl")


def _segments(source: InputFile, part_bytes: int, text_unit: str) -> Iterator[Segment]:
    if source.size > part_bytes and source.format == "parquet":
        yield from _row_group_segments(source, part_bytes)
    elif source.size > part_bytes and source.is_splittable(text_unit):
        for start in range(0, source.size, part_bytes):
            end = min(start + part_bytes, source.size)
            yield Segment(source, start, end, end - start, lines_before=None if start else 0)
    else:
        yield Segment(source, size=source.size)


def _row_group_segments(source: InputFile, part_bytes: int) -> Iterator[Segment]:
    """A file that pyarrow cannot read stays whole: whoever reads it reports the damage."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        yield Segment(source, size=source.size)
        return
    first, scale = 0, source.size / max(1, sum(sizes))  # total_byte_size is before compression
    for group in range(len(sizes)):
        size = int(sum(sizes[first:group + 1]) * scale)
        if size >= part_bytes or group == len(sizes) - 1:
            yield Segment(source, first, group + 1, size)
            first = group + 1


def _stream_parts(source: InputFile, part_bytes: int, number: int, spool_path) -> Iterator[Part]:
    spooler = _Spooler(source, part_bytes)
    while True:
        part = spooler.next_part(number, spool_path(number))
        if part is None:
            return
        yield part
        number += 1


class _Spooler:
    """Cuts one stream at line ends, at least `part_bytes` apart."""

    def __init__(self, source: InputFile, part_bytes: int):
        self.source, self.part_bytes = source, part_bytes
        self.stream = (open_stream(source.path, source.compression) if source.path != STANDARD_INPUT
                       else open(0, "rb", buffering=BLOCK_BYTES, closefd=False))
        self.carried = b""
        self.position = self.lines = self.stored = 0
        self.damage = None
        self.at_end = False

    def next_part(self, number: int, path: str | None) -> Part | None:
        """None once there is nothing left. The bytes go to `path`, where one is given."""
        if self.at_end and not self.carried:
            return None
        size = checksum = lines = 0
        with naming(path or os.devnull), open(path or os.devnull, "wb") as spool:
            for block in self._blocks():
                spool.write(block)
                checksum, size, lines = zlib.crc32(block, checksum), size + len(block), lines + block.count(b"\n")
        stored = self._stored_bytes(size)
        segment = Segment(self.source, self.position, self.position + size, stored - self.stored, path, self.lines)
        self.position, self.lines, self.stored = self.position + size, self.lines + lines, stored
        if self.at_end and not self.carried and self.damage is not None:
            segment = replace(segment, damage=self.damage)
        return Part(number, (segment,), checksum) if size or segment.damage else None

    def _blocks(self) -> Iterator[bytes]:
        """Blocks up to the first line end at or after `part_bytes`; what follows it is carried over."""
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
        if self.source.path == STANDARD_INPUT:
            return self.position + size
        return os.lseek(self.stream.raw.fileno(), 0, os.SEEK_CUR)
