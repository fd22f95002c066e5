"""The records of a segment of the input: the texts that each holds under the keys, or why it cannot be used.

A text under a key is a string, a `LongText`, or a list of strings where a document comes already split into sentences.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from megatron_deepseek.data.preprocess.files import count_lines
from megatron_deepseek.data.preprocess.inputs import InputFile
from megatron_deepseek.data.preprocess.keyed_texts import texts_of
from megatron_deepseek.data.preprocess.long_text import (
    LONG_LINE_BYTES, UNPARSED, BadDocument, LongText, decode_utf8, parse_json, parse_long_line, plain_text)
from megatron_deepseek.data.preprocess.plan import Segment
from megatron_deepseek.data.preprocess.streams import DamagedStream, open_stream
from megatron_deepseek.data.preprocess.wikitext import documents, joined

DAMAGED = "damaged file"  # the reason of a fault after which nothing more of the file can be read
BOM = b"\xef\xbb\xbf"
BYTES_PER_READ = 1 << 20
ROWS_BYTES = 1 << 20
class Record(NamedTuple):
    """One document of the input.

    `place` is the byte (after decompression) or the row where it begins, `line` counts from 1 in the segment, `texts`
    are in the order of the keys.
    """

    place: int
    line: int
    texts: tuple


class Fault(NamedTuple):
    """A document that cannot be used or, with the `reason` DAMAGED, all that would have followed in the file."""

    place: int
    line: int
    reason: str
    detail: str


class SegmentReader:
    """Iterates over the `Record`s and `Fault`s of a segment; `lines` counts the lines, or rows, read so far.

    `directory` is for lines too long to hold, which are written to files without a name.
    """

    def __init__(self, segment: Segment, keys: tuple[str, ...], text_unit: str, directory: str):
        self.segment, self.keys, self.directory = segment, keys, directory
        self.text_unit = text_unit
        self.lines = self.blank_lines = 0
        self.place = segment.start

    def __iter__(self) -> Iterator[Record | Fault]:
        input_file = self.segment.input_file
        try:
            if input_file.format == "parquet":
                yield from self._rows()
            elif input_file.format == "wikitext":
                yield from self._wikitext()
            elif input_file.format == "text" and self.text_unit == "file" and self.segment.spool is None:
                yield from self._whole_file()
            else:
                yield from self._lines()
        except (DamagedStream, OSError) as error:
            yield self._end(error)
        if self.segment.damage is not None:
            yield self._end(self.segment.damage)

    def _end(self, why) -> Fault:
        return Fault(self.place, self.lines + 1, DAMAGED, f"cannot be read any further: {why}")

    def _lines(self) -> Iterator[Record | Fault]:
        segment = self.segment
        with _open(segment) as file:
            for content in self._contents(file):
                if isinstance(content, bytes) and not content.strip():
                    self.blank_lines += 1
                    continue
                if segment.damage is not None and not _has_line_end(content):
                    self.lines -= 1  # the line in which a damaged stream breaks off is part of the damage
                    break
                yield self._record(content)

    def _contents(self, file) -> Iterator[bytes | mmap.mmap]:
        """Yield the lines that begin in the segment, with their line ends; `place` is set to where each begins."""
        segment = self.segment
        position = segment.start if segment.spool is None else 0
        shift = segment.start - position
        end = None if segment.end is None else segment.end - shift
        if position:
            file.seek(position - 1)
            position += _skip_line(file) - 1
        while end is None or position < end:
            content = file.readline(LONG_LINE_BYTES)
            if not content:
                break
            self.place, self.lines = position + shift, self.lines + 1
            if len(content) == LONG_LINE_BYTES and not content.endswith(b"\n"):
                content = _to_file(file, content, self.directory)
            position += len(content)
            yield content

    def _record(self, content: bytes | mmap.mmap) -> Record | Fault:
        try:
            if self.segment.input_file.format == "text":
                return Record(self.place, self.lines, self._line_texts(content))
            document = parse_json(content) if isinstance(content, bytes) else parse_long_line(content)
            if not isinstance(document, dict):
                raise BadDocument("not an object", f"a JSON object is needed, this is a {type(document).__name__}")
            return Record(self.place, self.lines, texts_of(document, self.keys))
        except BadDocument as error:
            if not _has_line_end(content) and is_cut(error, self.segment.input_file.format):
                return self._cut(error)
            return Fault(self.place, self.lines, error.reason, str(error))

    def _cut(self, error: BadDocument) -> Fault:
        return Fault(self.place, self.lines, DAMAGED, f"the file breaks off within its last line: {error}")

    def _line_texts(self, content: bytes | mmap.mmap) -> tuple:
        skipped = len(BOM) if self.place == 0 and content[:3] == BOM else 0
        if isinstance(content, bytes):
            return (decode_utf8(content[skipped:]).rstrip("\r\n"),)
        return (plain_text(content, skipped),)

    def _whole_file(self) -> Iterator[Record | Fault]:
        self.lines = 1
        with open_stream(self.segment.input_file.path, self.segment.input_file.compression) as file:
            content = file.read(LONG_LINE_BYTES)
            if len(content) == LONG_LINE_BYTES:
                content = _to_file(file, content, self.directory, whole=True)
        skipped = len(BOM) if content[:3] == BOM else 0
        try:
            text = decode_utf8(content[skipped:]) if isinstance(content, bytes) else plain_text(content, skipped)
            yield Record(0, 1, (text,))
        except BadDocument as error:
            yield self._cut(error) if is_cut(error, "text") else Fault(0, 1, error.reason, str(error))

    def _wikitext(self) -> Iterator[Record | Fault]:
        unit = "section" if self.text_unit == "section" else "article"
        with _open(self.segment) as file:
            lines = ((self.place, self.lines, content[:]) for content in self._contents(file))
            for place, line, content in documents(lines, unit):
                try:
                    text = decode_utf8(content[len(BOM) if place == 0 and content[:3] == BOM else 0:])
                    yield Record(place, line, (joined(text) if unit == "section" else text,))
                except BadDocument as error:
                    cut = not _has_line_end(content) and is_cut(error, "text")
                    yield self._cut(error) if cut else Fault(place, line, error.reason, str(error))

    def _rows(self) -> Iterator[Record | Fault]:
        import pyarrow
        try:
            yield from self._batches_of_rows()
        except (pyarrow.ArrowException, OSError) as error:
            yield self._end(str(error).partition("\n")[0].rstrip("."))

    def _batches_of_rows(self) -> Iterator[Record | Fault]:
        from pyarrow.parquet import ParquetFile
        with ParquetFile(self.segment.input_file.path, pre_buffer=False, page_checksum_verification=True) as file:
            sizes = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
            if sum(size.num_rows for size in sizes) != file.metadata.num_rows:
                raise DamagedStream(f"its row groups have {sum(size.num_rows for size in sizes)} rows, where the file "
                                    f"speaks of {file.metadata.num_rows}")
            groups = range(self.segment.start, len(sizes) if self.segment.end is None else self.segment.end)
            self.place = sum(sizes[group].num_rows for group in range(groups.start)) - 1
            names = file.schema_arrow.names
            wanted = {key if key in names else key.partition(".")[0] for key in self.keys}
            for group in groups:
                per_row = max(1, sizes[group].total_byte_size // max(1, sizes[group].num_rows))
                batches = file.iter_batches(max(1, min(1024, ROWS_BYTES // per_row)), [group],
                                            [name for name in names if name in wanted], use_threads=False)
                before = self.lines
                for batch in batches:
                    for number in range(batch.num_rows):
                        self.place, self.lines = self.place + 1, self.lines + 1
                        yield self._row_record(batch, number, names)
                if self.lines - before != sizes[group].num_rows:
                    raise DamagedStream(f"row group {group} gives {self.lines - before} rows, where the file speaks "
                                        f"of {sizes[group].num_rows}")

    def _row_record(self, batch, number: int, columns: list[str]) -> Record | Fault:
        try:
            row = {name: column[number].as_py() for name, column in zip(batch.schema.names, batch.columns)}
            return Record(self.place, self.lines, texts_of(row, self.keys, columns))
        except UnicodeDecodeError as error:  # pyarrow lets any bytes pass as text
            detail = f"invalid UTF-8: {error.reason} at byte {error.start}"
            return Fault(self.place, self.lines, "invalid UTF-8", detail)
        except BadDocument as error:
            return Fault(self.place, self.lines, error.reason, str(error))


def _open(segment: Segment):
    if segment.spool is not None:
        return open(segment.spool, "rb", buffering=BYTES_PER_READ)
    return open_stream(segment.input_file.path, segment.input_file.compression)


def _has_line_end(content: bytes | mmap.mmap) -> bool:
    return content[-1:] == b"\n"


def is_cut(error: BadDocument, form: str) -> bool:
    """Return whether the last line of a file, without a line end, was cut: no whole JSON, or half a character.

    A whole last line without a line end is a document like any other, and so is any last line of plain text.
    """
    return (error.reason in UNPARSED if form == "jsonl" else
            isinstance(error.__cause__, UnicodeDecodeError) and error.__cause__.reason == "unexpected end of data")


def _skip_line(file) -> int:
    """Read to the beginning of the next line and return the bytes up to it."""
    skipped = 0
    while True:
        content = file.readline(BYTES_PER_READ)
        skipped += len(content)
        if not content or content.endswith(b"\n"):
            return skipped


def _to_file(file, beginning: bytes, directory: str, whole: bool = False) -> mmap.mmap:
    """Return `beginning` and the rest of its line (or of the file, if `whole`), mapped from a file without a name."""
    with tempfile.TemporaryFile(dir=directory) as spool:
        content = beginning
        while content:
            _write(spool, content)
            content = (file.read(BYTES_PER_READ) if whole else
                       b"" if content.endswith(b"\n") else file.readline(BYTES_PER_READ))
        _write(spool, b"")
        return mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)


def _write(spool, content: bytes):
    """Write to a spool. Raise ValueError where there is no room: an OSError would be taken for damage of the input."""
    try:
        spool.write(content)
        spool.flush()
    except OSError as error:
        raise ValueError(f"--output-prefix: no room for a long document beside the parts: {error}") from error


def where(segment: Segment, line: int, lines_before: int | None = None) -> str:
    """Return the file and the line (from 1) or row of a record. Count the lines before the segment if nobody has."""
    path = segment.input_file.path
    if segment.input_file.format == "parquet":
        return f"{path} row {line}" + (f" from row group {segment.start}" if segment.start else "")
    before = segment.lines_before if lines_before is None else lines_before
    return f"{path} line {line + (count_lines(path, segment.start) if before is None else before)}"


def texts_of_file(input_file: InputFile, key: str) -> Iterator[str]:
    """Yield every text of a file, long ones in pieces. Raise ValueError, with file and line, for a fault."""
    directory = os.path.dirname(os.path.abspath(input_file.path))
    for record in SegmentReader(Segment(input_file), (key,), "file", directory):
        if isinstance(record, Fault):
            raise ValueError(f"{where(Segment(input_file), record.line)}: {record.detail}")
        value, = record.texts
        yield from value.pieces() if isinstance(value, LongText) else [value] if isinstance(value, str) else value
