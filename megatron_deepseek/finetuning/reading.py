"""Rows of the input files with the lines where they begin, in parts that workers parse and tokenise.

JSONL is cut into parts of lines here and parsed by the workers; a JSON array is parsed here, value by value, in bounded
memory; of parquet a part is a row group, which the worker reads itself. The parts depend on the files alone, so that a
run that was killed finds those that it made before.
"""

import codecs
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_deepseek.data.preprocess.inputs import InputFile
from megatron_deepseek.data.preprocess.streams import DamagedStream, open_stream
from megatron_deepseek.finetuning.conversation import BadRow
from megatron_deepseek.packages import how_to_install

LEAST_PART, LARGEST_PART, PARTS = 1 << 18, 1 << 24, 64
READ_BYTES = 1 << 20
LONGEST_VALUE = 1 << 28


@dataclass(frozen=True)
class Part:
    """Rows of a file: (line, bytes of a line or parsed value) each, or the rows of a parquet file's row group."""

    number: int
    file: int
    rows: tuple[tuple[int, object], ...] = ()
    group: int | None = None
    size: int = 0


def part_bytes(files: list[InputFile]) -> int:
    """Return the bytes of a part: a function of the input, so that a continued run cuts the same ones."""
    return min(max(sum(file.size for file in files) // PARTS, LEAST_PART), LARGEST_PART)


def check_packages(files: list[InputFile], option: str):
    """Raise ValueError where a format needs a package that is not installed."""
    for file in files:
        package = {"parquet": "pyarrow"}.get(file.format) or {"zstd": "zstandard"}.get(file.compression)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"{option} {file.path}: reading it needs the package {package}: "
                             f"{how_to_install(package)}")


def parts_of(files: list[InputFile]) -> Iterator[Part]:
    """Yield the parts of all files. Raise ValueError, with file and line, where one cannot be read any further."""
    number, size = 0, part_bytes(files)
    for place, file in enumerate(files):
        for rows, group, taken in _file_parts(file, size):
            yield Part(number, place, rows, group, taken)
            number += 1


def _file_parts(file: InputFile, size: int):
    if file.format == "parquet":
        from pyarrow.parquet import ParquetFile
        try:
            with ParquetFile(file.path) as opened:
                sizes = [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]
        except Exception as error:  # the library's own classes, and OSError
            raise ValueError(f"{file.path}: no readable parquet file: {str(error).splitlines()[0]}") from error
        yield from (((), group, taken) for group, taken in enumerate(sizes))
        return
    rows, held = [], 0
    for line, content, taken in _values(file):
        rows.append((line, content))
        held += taken
        if held >= size:
            yield tuple(rows), None, held
            rows, held = [], 0
    if rows:
        yield tuple(rows), None, held


def _values(file: InputFile) -> Iterator[tuple[int, object, int]]:
    """Yield (line, bytes of a JSONL line or parsed value, size)."""
    try:
        with open_stream(file.path, file.compression) as stream:
            beginning = stream.peek(READ_BYTES) if hasattr(stream, "peek") else b""
            first = beginning.removeprefix(codecs.BOM_UTF8).lstrip()
            if first[:1] == b"[" or not _is_jsonl(first):
                yield from _parsed(file.path, stream)
            else:
                for line, content in enumerate(stream, 1):
                    if content.strip():
                        yield line, content, len(content)
    except (DamagedStream, OSError) as error:
        raise ValueError(f"{file.path} cannot be read any further: {error}") from error


def _is_jsonl(beginning: bytes) -> bool:
    """Return whether the first line is whole, or no JSON at all; objects over several lines are read as values."""
    line, _, rest = beginning.partition(b"\n")
    return line.strip() != b"{" and not (rest and line.rstrip().endswith((b",", b"{", b"[")))


def _parsed(path: str, stream) -> Iterator[tuple[int, object, int]]:
    """Yield the values of a JSON array, or of values that follow each other, each with its line."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text, place, line, ended, brackets = "", 0, 1, False, 0
    while True:
        while place < len(text) and text[place] in " \t\r\n,[]":
            line += text[place] == "\n"
            brackets += (text[place] == "[") - (text[place] == "]")
            place += 1
        if place < len(text):
            try:
                value, end = decoder.raw_decode(text, place)
            except ValueError as error:
                if ended or len(text) - place > LONGEST_VALUE:
                    raise ValueError(f"{path} line {line + text.count(chr(10), place, getattr(error, 'pos', place))}: "
                                     f"malformed JSON: {getattr(error, 'msg', error)}; mend the file") from error
            else:
                if end < len(text) or ended:  # else a number could go on
                    yield line, value, end - place
                    line, place = line + text.count("\n", place, end), end
                    continue
        if ended and brackets:
            raise ValueError(f"{path} line {line}: the file breaks off before the end of its list; copy it again")
        if ended:
            return
        more = stream.read(max(READ_BYTES, len(text) - place))
        try:
            text, place, ended = text[place:] + utf8.decode(more, not more), 0, not more
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, behind line {line}: not UTF-8 ({error.reason}); save the file as UTF-8"
                             ) from error


def parse_line(content: object):
    """Return the value of a row of a part. Raise BadRow where a line is no JSON."""
    if not isinstance(content, bytes):
        return content
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"not UTF-8: {error.reason} at byte {error.start} of the line; save the file as UTF-8"
                     ) from error
    except (ValueError, RecursionError) as error:
        raise BadRow("malformed JSON", f"malformed JSON: {error}; each line must be a whole object") from error


def read_rows(part: Part, file: InputFile) -> Iterator[tuple[int, object]]:
    """Yield (line, row) of a part; of parquet the row's number in the file, from 1."""
    if part.group is None:
        yield from part.rows
        return
    from pyarrow.parquet import ParquetFile
    with ParquetFile(file.path, pre_buffer=False) as opened:
        line = sum(opened.metadata.row_group(group).num_rows for group in range(part.group))
        for batch in opened.iter_batches(256, [part.group], use_threads=False):
            for row in batch.to_pylist():
                line += 1
                yield line, _without_none(row)


def _without_none(value):
    """Return a row without the keys that are null: parquet gives every object the keys of all."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
