"""Reading any region of a tensor from the items of a directory (DCP's, mostly), without reading more than it needs.

DCP's own reader loads a saved item whole (a rank's share of a layer's stacked experts: up to 15 GB for V3) for any
part of it. Here torch.load with `map_location="meta"` finds where an item's numbers begin, without reading them, and
the wanted bytes are read from there.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_deepseek.checkpoint import raw_bytes
from megatron_deepseek.checkpoint.dcp.files import Item, StoredTensors
from megatron_deepseek.parallel.regions import Region, segments
from megatron_deepseek.checkpoint.safetensors_file import as_bytes

_MOST_OPEN = 32  # files that a reader keeps open
_WASTE = 4  # whole rows are read and cut, unless that reads more than so many times what is wanted
_CUT_BYTES = 1 << 22  # so many are read at a time where rows are cut
_MOST_BEGINS = 1 << 16  # so many beginnings of items are remembered
_ZIP = b"PK\x03\x04"  # the first bytes of what torch.save writes
_GATHER_BYTES = 1 << 20  # so many are put together at a time


class Section(io.RawIOBase):
    """Bytes offset..offset + length of an open file, as a file of their own, from which torch.load reads an item."""

    def __init__(self, descriptor: int, offset: int, length: int):
        self.descriptor, self.offset, self.length, self.position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self.position = position + (0, self.position, self.length)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:
        wanted = memoryview(buffer).cast("B")[:max(self.length - self.position, 0)]
        count = os.preadv(self.descriptor, [wanted], self.offset + self.position)
        self.position += count
        return count


class ItemReader:
    """Reads items of `directory` on one thread. It keeps files open, so that the kernel reads ahead."""

    def __init__(self, directory: StoredTensors):
        self.directory = directory
        self._open: dict[str, int] = {}
        self._block: memoryview | None = None

    def __enter__(self) -> "ItemReader":
        return self

    def __exit__(self, *_) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def stream(self, item: Item, part: Region) -> Iterator[memoryview]:
        """Yield the bytes of a contiguous part of `item`, a block at a time; each is overwritten by the next."""
        if self._block is None:
            self._block = memoryview(bytearray(raw_bytes.BLOCK_BYTES))
        with self._reading(item) as descriptor:
            position = self._begin(item, descriptor) + item.region.position(part.place) * item.dtype.itemsize
            yield from raw_bytes.blocks(descriptor, position, part.numel * item.dtype.itemsize, self._block)

    def numbers(self, name: str, region: Region) -> Iterator[memoryview]:
        """Yield a region's bytes of the tensor `name` in row-major order; each block is overwritten by the next."""
        size = self.directory.dtypes[name].itemsize
        for segment in segments(region, self.directory.covering(name, region), _GATHER_BYTES // size):
            if segment.is_contiguous:
                yield from self.stream(segment.sources[0], segment.region)
            else:
                out = torch.empty(segment.region.shape, dtype=self.directory.dtypes[name])
                self.gather(segment.region, segment.sources, out)
                yield as_bytes(out)

    def read(self, name: str, region: Region) -> torch.Tensor:
        """Read a region of the tensor `name`, in the dtype that it is stored in."""
        out = torch.empty(region.shape, dtype=self.directory.dtypes[name])
        self.gather(region, self.directory.covering(name, region), out)
        return out

    def gather(self, region: Region, sources: Sequence[Item], out: torch.Tensor) -> None:
        """Fill `out`, of the region's shape and the items' dtype, from the items `sources` that cover the region."""
        for item in sources:
            part = region.overlap(item.region)
            if part is None:
                continue
            with self._reading(item) as descriptor:
                _copy(descriptor, self._begin(item, descriptor), item, part, out[region.slices(part)])

    @contextmanager
    def _reading(self, item: Item) -> Iterator[int]:
        """Open the item's file, if it is not; turn errors into a ValueError that names tensor and file."""
        try:
            yield self._descriptor(item.file)
        except (OSError, EOFError, RuntimeError) as error:
            raise ValueError(f"{self.directory.directory / item.file}: {item.name} cannot be read: {error}") from error

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            if len(self._open) == _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file] = os.open(self.directory.directory / file, os.O_RDONLY)
        return self._open[file]

    def _begin(self, item: Item, descriptor: int) -> int:
        """Return the byte at which an item's numbers begin, which is found once for all reads from it."""
        if item.length == item.region.numel * item.dtype.itemsize:  # bare numbers
            return item.offset
        known = self.directory.begins
        begin = known.get((item.file, item.offset))
        if begin is None:
            begin = _numbers_begin(descriptor, item)
            if len(known) >= _MOST_BEGINS:
                known.clear()
            known[item.file, item.offset] = begin
        return begin


def read_part(descriptor: int, item: Item, part: Region, target: torch.Tensor) -> None:
    """Read `part`, a region of the tensor within an item in an open file, into `target`.

    `target` is a view of the part's shape, of any dtype and device. Raise RuntimeError, EOFError or OSError if the file
    is not what the item says.
    """
    _copy(descriptor, _numbers_begin(descriptor, item), item, part, target)


def read(directory: StoredTensors, name: str, region: Region) -> torch.Tensor:
    """Read one region, as `ItemReader.read` does."""
    with ItemReader(directory) as reader:
        return reader.read(name, region)


def _numbers_begin(descriptor: int, item: Item) -> int:
    """Find the byte at which an item's numbers begin; raise RuntimeError unless they are contiguous.

    torch.save does not promise that they are.
    """
    if os.pread(descriptor, len(_ZIP), item.offset) != _ZIP:  # refuse the older formats of torch.load, too
        raise RuntimeError(f"what torch.save wrote at byte {item.offset} is damaged")
    try:
        tensor = torch.load(Section(descriptor, item.offset, item.length), map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise all kinds of errors, in many lines
        raise RuntimeError(f"what torch.save wrote at byte {item.offset} is damaged") from error
    if tuple(tensor.shape) != item.shape or tensor.dtype != item.dtype or not tensor.is_contiguous():
        raise RuntimeError(f"it is saved as {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
                           f"not as contiguous {item.dtype} {item.shape}")
    return (item.offset + tensor.untyped_storage()._checkpoint_offset
            + tensor.storage_offset() * item.dtype.itemsize)


def _copy(descriptor: int, begin: int, item: Item, part: Region, target: torch.Tensor) -> None:
    """Read `part` of an item, whose numbers begin at byte `begin`, into `target`, a view of any dtype and device.

    If the part is contiguous in the item, and the target's memory is on the CPU, contiguous and of the same dtype, the
    bytes are read straight into it. Otherwise a few rows are read at a time and copied from there.
    """
    axis = next((dim for dim, size in enumerate(part.shape) if size > 1), None)
    contiguous, size = item.region.is_contiguous(part), item.dtype.itemsize
    source = part if contiguous else None
    if contiguous and target.device.type == "cpu" and target.dtype == item.dtype and target.is_contiguous():
        return raw_bytes.fill(descriptor, as_bytes(target), begin + item.region.position(part.place) * size)
    if axis == len(part.shape) - 2 and part.shape[-1] * _WASTE >= item.shape[-1]:
        source = Region((*part.place[:-1], item.place[-1]), (*part.shape[:-1], item.shape[-1]))
    if source is not None and (axis is None or source.numel * size <= _CUT_BYTES):
        whole = torch.empty(source.shape, dtype=item.dtype)
        raw_bytes.fill(descriptor, as_bytes(whole), begin + item.region.position(source.place) * size)
        target.copy_(whole[source.slices(part)])
        return
    step = 1 if source is None else max(1, part.shape[axis] * _CUT_BYTES // (source.numel * size))
    for rows in part.cut(axis, range(part.place[axis] + step, part.end[axis], step)):
        _copy(descriptor, begin, item, rows, target[part.slices(rows)])
