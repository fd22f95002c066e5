"""Small files and their checksums."""

import contextlib
import json
import os
import zlib


def checksum_of(path: str) -> int:
    """CRC-32."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def count_lines(path: str, end: int) -> int:
    """Line ends before byte `end`."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(end, 1 << 20))):
            count, end = count + block.count(b"\n"), end - len(block)
    return count


def write_json(path: str, value):
    """Whole or not at all. OSError leaves nothing behind."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=1)
        os.replace(path + ".tmp", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise
