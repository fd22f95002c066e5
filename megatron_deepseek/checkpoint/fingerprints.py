"""Fingerprints of finished files: after a kill they tell which files can be kept and which must be written again."""

import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from sys import intern

import torch
import xxhash

from megatron_deepseek.checkpoint.dcp.files import Item
from megatron_deepseek.checkpoint.integrity import Checksum

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """A finished file: its size in bytes, the XXH3 digests of its byte ranges, and the DCP items in it.

    Each of `ranges` is (offset, length, digest); together they are the whole file. workspace.py keeps fingerprints as
    JSON, where `ranges` has the key "regions".
    """

    size: int
    ranges: list[tuple[int, int, str]]
    items: list[Item] = field(default_factory=list)

    @property
    def checksum(self) -> Checksum | None:
        """Return the checksum of the whole file, None unless it was written from its beginning to its end."""
        return Checksum(self.size, self.ranges[0][2]) if len(self.ranges) == 1 else None

    def to_json(self) -> dict:
        items = [asdict(item) | {"dtype": str(item.dtype).removeprefix("torch.")} for item in self.items]
        return {"size": self.size, "regions": self.ranges, "items": items}

    @classmethod
    def from_json(cls, fields: dict) -> "Fingerprint":
        shared = cache(lambda *numbers: numbers)  # layers are alike: equal tuples are kept once
        items = [Item(intern(item["name"]), shared(*item["place"]), shared(*item["shape"]),
                      getattr(torch, item["dtype"]), intern(item["file"]), item["offset"], item["length"])
                 for item in fields["items"]]
        return cls(fields["size"], [tuple(each) for each in fields["regions"]], items)


def verify(path: Path, fingerprint: Fingerprint) -> bool:
    """Return whether the file still is what `fingerprint` says; every byte of it is read."""
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != fingerprint.size:
                return False
            return all(_digest(file, offset, length, buffer) == digest for offset, length, digest in fingerprint.ranges)
    except OSError:
        return False


def _digest(file, offset: int, length: int, buffer: memoryview) -> str | None:
    digest, end = xxhash.xxh3_128(), offset + length
    while offset < end:
        count = os.preadv(file.fileno(), [buffer[:min(len(buffer), end - offset)]], offset)
        if not count:
            return None
        digest.update(buffer[:count])
        offset += count
    return digest.hexdigest()
