"""A file of DCP items, written from its beginning to its end with its checksum, never more than a block in memory."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.dcp.files import Item
from megatron_deepseek.checkpoint.dcp.item_frame import frame
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.integrity import RunningChecksum
from megatron_deepseek.checkpoint.regions import Region

ITEM_BYTES = 1 << 28  # of an item; DCP's reader holds one in memory
_REPORT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class ItemRegion:
    """The part `region` of the tensor `name`, to be stored as `dtype`."""

    name: str
    region: Region
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.region.numel * self.dtype.itemsize


@dataclass(frozen=True)
class ItemFile:
    """A file to write and what is in it."""

    name: str
    parts: tuple[ItemRegion, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class FileWriter:
    """A file that is being written; an error names it and the tensor that was being written."""

    def __init__(self, path: Path):
        self.path, self.tensor, self.position = path, "the header", 0
        self.checksum = RunningChecksum()
        self.file = open(path, "wb", buffering=0)

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data) -> None:
        """At the current position, counted in the checksum."""
        self.write_at(self.position, data)
        self.checksum.update(data)
        self.position += len(data)

    def write_at(self, offset: int, data) -> None:
        data = memoryview(data).cast("B")
        try:
            while len(data):
                count = os.pwrite(self.file.fileno(), data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise ValueError(f"{self.path}: {self.tensor} cannot be written: {error.strerror}") from error


def split(part: ItemRegion) -> list[ItemRegion]:
    """As items of at most ITEM_BYTES, cut along the leading dimensions."""
    return [ItemRegion(part.name, region, part.dtype) for region in part.region.runs(ITEM_BYTES // part.dtype.itemsize)]


def write_items(path: Path, name: str, parts: Iterable[ItemRegion],
                numbers: Callable[[ItemRegion], Iterable[memoryview]], advance: Callable[[int], None]) -> Fingerprint:
    """Write `parts`, each an item, in order as the file that will be called `name`.

    `numbers(part)` gives the bytes of a part in row-major order, in blocks that are used up at once.
    """
    items = []
    with FileWriter(path) as file:
        for part in parts:
            begin, file.tensor = file.position, part.name
            around = frame(part.region.shape, part.dtype)
            file.write(around.head)
            _write_numbers(file, part, numbers, advance)
            file.write(around.tail)
            items.append(Item(part.name, part.region.place, part.region.shape, part.dtype, name, begin,
                              file.position - begin))
    return Fingerprint(file.position, [(0, file.position, file.checksum.result().digest)], items)


def _write_numbers(file: FileWriter, part: ItemRegion, numbers: Callable[[ItemRegion], Iterable[memoryview]],
                   advance: Callable[[int], None]) -> None:
    begin = reported = file.position
    for block in numbers(part):
        file.write(block)
        if file.position - reported >= _REPORT_BYTES:
            advance(file.position - reported)
            reported = file.position
    advance(file.position - reported)
    assert file.position - begin == part.nbytes, part
