"""Files of DCP items, written from beginning to end with a checksum, never more than a block of numbers in memory.

torch.save wants the whole tensor in memory, and computes a CRC-32 of it that torch.load never looks at. Here only what
torch.save writes around a tensor's numbers is kept (`frame`), and the numbers are streamed in between from anywhere.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch.serialization import skip_data

from megatron_deepseek.checkpoint.dcp.files import Item
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.integrity import RunningChecksum
from megatron_deepseek.parallel.regions import Region

ITEM_BYTES = 1 << 28  # at most in an item, which DCP's own reader holds in memory
_REPORT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class ItemRegion:
    """The region of the tensor `name` that becomes an item (or several, see `split`), stored as `dtype`."""

    name: str
    region: Region
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.region.numel * self.dtype.itemsize


@dataclass(frozen=True)
class ItemFile:
    """A file to write: its name and the items in it, in order."""

    name: str
    items: tuple[ItemRegion, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True)
class Frame:
    """What torch.save writes around a tensor: the bytes before and after its numbers."""

    head: bytes
    tail: bytes


class _Gap:
    """A file for torch.save that keeps what is written, and notes where the numbers are left out by a seek.

    `skipped`: how many writes came before the seek, and the bytes that it leaves out.
    """

    def __init__(self):
        self.written: list[bytes] = []
        self.skipped: tuple[int, int] | None = None

    def write(self, data) -> int:
        self.written.append(bytes(data))
        return len(self.written[-1])

    def seek(self, offset: int, whence: int) -> None:
        assert whence == 1 and self.skipped is None, (offset, whence)
        self.skipped = len(self.written), offset

    def flush(self) -> None:
        """Do nothing: torch.save calls it, and nothing is buffered."""


@lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """Return the frame of a contiguous tensor with at least one number.

    torch.save runs under `skip_data`, so the tensor's memory is reserved for a moment and never touched. The CRC in the
    zip's directory is then 0, as torch.serialization.set_crc32_options(False) has it.
    """
    file = _Gap()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), file)
    assert file.skipped is not None and file.skipped[1] == prod(shape) * dtype.itemsize, (shape, file.skipped)
    middle = file.skipped[0]
    return Frame(b"".join(file.written[:middle]), b"".join(file.written[middle:]))


class FileWriter:
    """A file that is being written. Errors name it and `tensor`, which the caller sets to what is being written.

    `checksum` counts what `write` has written, not `write_at`.
    """

    def __init__(self, path: Path):
        self.path, self.tensor, self.position = path, "the header", 0
        self.checksum = RunningChecksum()
        self.file = open(path, "wb", buffering=0)

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data) -> None:
        """Write at the current position, and count the bytes in the checksum."""
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


def split(item: ItemRegion) -> list[ItemRegion]:
    """Cut an item along its leading dimensions into items of at most ITEM_BYTES."""
    largest = ITEM_BYTES // item.dtype.itemsize
    return [ItemRegion(item.name, region, item.dtype) for region in item.region.contiguous_parts(largest)]


def write_items(path: Path, name: str, items: Iterable[ItemRegion],
                numbers: Callable[[ItemRegion], Iterable[memoryview]], advance: Callable[[int], None]) -> Fingerprint:
    """Write `items` in order to `path`, a file that will be called `name`, and return its fingerprint.

    `numbers(item)` yields an item's bytes in row-major order, in blocks that are written before the next is asked for.
    """
    stored = []
    with FileWriter(path) as file:
        for item in items:
            begin, file.tensor = file.position, item.name
            around = frame(item.region.shape, item.dtype)
            file.write(around.head)
            _write_numbers(file, item, numbers, advance)
            file.write(around.tail)
            stored.append(Item(item.name, item.region.place, item.region.shape, item.dtype, name, begin,
                               file.position - begin))
    return Fingerprint(file.position, [(0, file.position, file.checksum.result().digest)], stored)


def _write_numbers(file: FileWriter, item: ItemRegion, numbers: Callable[[ItemRegion], Iterable[memoryview]],
                   advance: Callable[[int], None]) -> None:
    begin = reported = file.position
    for block in numbers(item):
        file.write(block)
        if file.position - reported >= _REPORT_BYTES:
            advance(file.position - reported)
            reported = file.position
    advance(file.position - reported)
    assert file.position - begin == item.nbytes, item
