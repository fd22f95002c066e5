"""What a finished file is known by, so that after a kill it can be kept or written again."""

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
    """Size and XXH3 digests of regions [offset, length, digest], which together are the file; the DCP items in it."""

    size: int
    regions: list[tuple[int, int, str]]
    items: list[Item] = field(default_factory=list)

    @property
    def checksum(self) -> Checksum | None:
        """Of the whole file, where it was written from its beginning to its end."""
        return Checksum(self.size, self.regions[0][2]) if len(self.regions) == 1 else None

    def to_json(self) -> dict:
        items = [asdict(item) | {"dtype": str(item.dtype).removeprefix("torch.")} for item in self.items]
        return {"size": self.size, "regions": self.regions, "items": items}

    @classmethod
    def from_json(cls, fields: dict) -> "Fingerprint":
        shared = cache(lambda *numbers: numbers)  # layers are alike: what is equal is kept once
        items = [Item(intern(item["name"]), shared(*item["place"]), shared(*item["shape"]),
                      getattr(torch, item["dtype"]), intern(item["file"]), item["offset"], item["length"])
                 for item in fields["items"]]
        return cls(fields["size"], [tuple(region) for region in fields["regions"]], items)


def verify(path: Path, fingerprint: Fingerprint) -> bool:
    """Whether the file still is what `fingerprint` says, every byte of it."""
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != fingerprint.size:
                return False
            return all(_digest(file, offset, length, buffer) == digest
                       for offset, length, digest in fingerprint.regions)
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
