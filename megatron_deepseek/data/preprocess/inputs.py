"""The input files that the user names: files, globs, directories, standard input; their formats and compression."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STANDARD_INPUT = "-"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".text": "text", ".md": "text",
           ".tokens": "wikitext", ".parquet": "parquet"}
BEGINNINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"PAR1": "parquet"}


@dataclass(frozen=True)
class InputFile:
    """One file of the input. `index` is its place among them, `size` in bytes as stored, `modified` in ns."""

    index: int
    path: str
    format: str
    compression: str | None
    size: int
    modified: int

    def is_splittable(self, text_unit: str) -> bool:
        """Return whether reading may begin at any byte, because a line end can be found from there."""
        return self.compression is None and (self.format == "jsonl" or self.format == "text" and text_unit == "line")


def find_inputs(patterns: Iterable[str], input_format: str = "auto", without: Iterable[str] = ()) -> list[InputFile]:
    """Return the input files that `patterns` name, in order; those of one glob or directory are sorted.

    Of a directory, at any depth, the files with a known ending are taken, but no hidden ones. The files and folders
    `without` are left out: the run's own output, which may lie beside its input. Raise ValueError where a pattern names
    no file.
    """
    own = tuple(map(os.path.realpath, without))
    paths = [path for path in find_paths(patterns) if not _is_within(path, own)]
    return [_describe_file(index, path, input_format) for index, path in enumerate(paths)]


def _is_within(path: str, own: tuple[str, ...]) -> bool:
    real = os.path.realpath(path) if own and path != STANDARD_INPUT else path
    return any(real == each or real.startswith(each + os.sep) for each in own)


def find_paths(patterns: Iterable[str]) -> list[str]:
    found = []
    for pattern in patterns:
        if pattern == STANDARD_INPUT or os.path.isfile(pattern):
            paths = [pattern]
        elif os.path.isdir(pattern):
            paths = _files_below(pattern)
            if not paths:
                raise ValueError(f"--input {pattern}: no file in this directory ends in one of {' '.join(FORMATS)}, "
                                 f"with or without {' '.join(COMPRESSIONS)}")
        else:
            paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not paths:
            raise ValueError(f"--input {pattern}: no such file")
        found.extend(paths)
    return found


def _files_below(directory: str) -> list[str]:
    found = []
    for parent, children, names in os.walk(directory):
        children[:] = [child for child in children if not child.startswith(".")]
        found.extend(os.path.join(parent, name) for name in names
                     if not name.startswith(".") and _format_by_name(name)[0] is not None)
    return sorted(found)


def _format_by_name(name: str) -> tuple[str | None, str | None]:
    """Return (format, compression) by the endings of a name, each None where they don't tell."""
    path = Path(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    inner = Path(path.stem).suffix if compression else path.suffix
    return FORMATS.get(inner.lower()), compression


def _describe_file(index: int, path: str, input_format: str) -> InputFile:
    """Return the input file at `path`.

    An unknown ending means JSONL. The compression is told by the first bytes, or else by the ending.
    """
    if path == STANDARD_INPUT:
        return InputFile(index, path, "jsonl" if input_format == "auto" else input_format, None, 0, 0)
    by_name, compression = _format_by_name(path)
    try:
        status = os.stat(path)
        with open(path, "rb") as file:
            beginning = file.read(6)
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read: {error.strerror}") from error
    by_content = next((name for magic, name in BEGINNINGS.items() if beginning.startswith(magic)), None)
    if by_content == "parquet":
        by_name = by_name or "parquet"
    elif by_name != "parquet":
        compression = by_content or compression
    chosen = (by_name or "jsonl") if input_format == "auto" else input_format
    return InputFile(index, path, chosen, compression, status.st_size, status.st_mtime_ns)
