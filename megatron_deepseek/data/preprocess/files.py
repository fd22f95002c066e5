"""Small files, written whole or not at all, and their checksums."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import TextIO

from megatron_deepseek.data.naming import naming


def checksum_of(path: str) -> int:
    """Return the CRC-32 of a file."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def count_lines(path: str, end: int) -> int:
    """Return the number of line ends before byte `end`."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(end, 1 << 20))):
            count, end = count + block.count(b"\n"), end - len(block)
    return count


def write_json(path: str, value):
    """Write `value` as JSON, whole or not at all."""
    with written_aside(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)


@contextlib.contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[TextIO]:
    """Yield a text file that gets the name `path` once the block has succeeded.

    Where the block fails, nothing stays; an OSError names the file.
    """
    aside = f"{os.fspath(path)}.tmp"
    try:
        with naming(aside), open(aside, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def refuse_directory(option: str, path: str | os.PathLike):
    """Raise ValueError where the file to write is a directory, before work is spent on it."""
    if os.path.isdir(path):
        raise ValueError(f"{option} {path} is a directory; give the name of a file in it")


def refuse_unwritable(option: str, path: str | os.PathLike):
    """Raise ValueError where `path` cannot be written, before work is spent on what would be in it.

    It leaves no file behind where there was none.
    """
    refuse_directory(option, path)
    there = os.path.exists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}") from error
    if not there:
        os.unlink(path)
