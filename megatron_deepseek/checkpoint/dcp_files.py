"""The files of a torch.distributed.checkpoint (DCP) directory, read and written a part of a tensor at a time.

DCP's own reader loads a saved item whole (a rank's share of a layer's stacked experts: up to 15 GB for V3) for any
part of it, and its writer wants a state dict. The items are zip files of torch.save inside larger files; where their
numbers begin, torch.load says without reading them (`map_location="meta"`). Checkpoints written here are DCP's own.
"""

import bisect
import io
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_deepseek.checkpoint.safetensors_file import as_bytes, fill

METADATA = ".metadata"
_CUT_BYTES = 1 << 24  # read at a time where rows are cut


@dataclass(frozen=True)
class Item:
    """A part of the tensor `name`, saved by torch.save at bytes offset..offset + length of `file`."""

    name: str
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


class Section(io.RawIOBase):
    """Bytes offset..offset + length of a file, as a file: what torch.load wants to see of an item."""

    def __init__(self, file, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

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
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[:max(self.length - self.position, 0)])
        self.position += count
        return count


class DcpDirectory:
    """Tensors of a DCP directory: `shapes` and `dtypes` by name, and any part of them."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        try:
            metadata = dcp.FileSystemReader(self.directory).read_metadata()
            tensors = {name: entry for name, entry in metadata.state_dict_metadata.items()
                       if isinstance(entry, TensorStorageMetadata)}
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
            raise ValueError(f"{self.directory / METADATA} cannot be read: {error}") from error
        self.shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}
        self.items = self._items(tensors, metadata.storage_data)
        self.starts = {name: [item.place[:1] for item in items] for name, items in self.items.items()}
        self._check_files()

    def _items(self, tensors: dict, storage: dict) -> dict[str, list[Item]]:
        """Each tensor's items in the order of their first dimension."""
        items = defaultdict(list)
        for name, entry in tensors.items():
            for chunk in entry.chunks:
                info = storage.get(MetadataIndex(name, chunk.offsets))
                if info is None:
                    raise ValueError(f"{self.directory / METADATA} does not say where {name} at "
                                     f"{tuple(chunk.offsets)} is")
                if getattr(info, "transform_descriptors", None):
                    raise ValueError(f"{self.directory / info.relative_path}: {name} is stored compressed, "
                                     f"which is not supported")
                items[name].append(Item(name, tuple(chunk.offsets), tuple(chunk.sizes), entry.properties.dtype,
                                        info.relative_path, info.offset, info.length))
            items[name].sort(key=lambda item: item.place)
        return items

    def _check_files(self) -> None:
        """Every file that an item needs is there, and long enough."""
        last: dict[str, Item] = {}
        for item in (item for items in self.items.values() for item in items):
            if item.file not in last or item.offset > last[item.file].offset:
                last[item.file] = item
        for name, item in last.items():
            path = self.directory / name
            if not path.is_file():
                raise ValueError(f"{path} is missing: {item.name} is in it")
            if path.stat().st_size < item.offset + item.length:
                raise ValueError(f"{path} is truncated: {item.name} ends at byte {item.offset + item.length}, "
                                 f"the file at {path.stat().st_size}")

    def read(self, name: str, place: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The part of `name` of `shape` that begins at `place`."""
        out = torch.empty(shape, dtype=self.dtypes[name])
        found = 0
        for item in self._near(name, place, shape):
            low = tuple(map(max, place, item.place))
            high = tuple(min(a + n, b + m) for a, n, b, m in zip(place, shape, item.place, item.shape))
            if any(a >= b for a, b in zip(low, high)):
                continue
            target = out[tuple(slice(a - p, b - p) for a, b, p in zip(low, high, place))]
            self._copy(item, tuple(slice(a - p, b - p) for a, b, p in zip(low, high, item.place)), target)
            found += target.numel()
        if found < out.numel():
            raise ValueError(f"{self.directory}: {name} has only {found} of the {out.numel()} numbers "
                             f"at {place} of shape {shape}")
        return out

    def _near(self, name: str, place: tuple[int, ...], shape: tuple[int, ...]) -> list[Item]:
        """Items that begin before the end of the part along the first dimension, without those long before it."""
        items = self.items[name]
        if not place:
            return items
        stop = bisect.bisect_left(self.starts[name], (place[0] + shape[0],))
        longest = max(item.shape[0] for item in items)
        return items[bisect.bisect_right(self.starts[name], (place[0] - longest,)):stop]

    def _copy(self, item: Item, part: tuple[slice, ...], target: torch.Tensor) -> None:
        """Read `part` of an item into `target`, which may be a view."""
        path = self.directory / item.file
        try:
            with open(path, "rb", buffering=0) as file:
                read_part(file, item, part, target)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: {item.name} cannot be read: {error}") from error


def read_part(file, item: Item, part: tuple[slice, ...], target: torch.Tensor) -> None:
    """`part` of an item, in the coordinates of the item, from its open file into `target`, which may be a view.

    RuntimeError, EOFError, OSError or UnpicklingError if the file is not what the item says.
    """
    begin = _numbers_begin(file, item)
    for index in range(part[0].start, part[0].stop) if len(part) == 3 else [None]:
        inner, goal = (part, target) if index is None else (part[1:], target[index - part[0].start])
        skipped = begin if index is None else begin + index * _nbytes(item.shape[1:], item.dtype)
        shape = item.shape if index is None else item.shape[1:]
        _read_rows(file, skipped, shape, item.dtype, inner, goal)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _read_rows(file, begin: int, shape: tuple[int, ...], dtype: torch.dtype, part: tuple[slice, ...],
               target: torch.Tensor) -> None:
    """A part of a vector or matrix of `shape` that lies at byte `begin`: whole rows are read, some at a time, then cut.

    Rows that go whole into contiguous memory of this machine and the same type are read right there.
    """
    row = _nbytes(shape[1:], dtype)
    rows = part[0] if part else slice(0, 1)
    goal = target.view(-1) if target.ndim == 0 else target
    file.seek(begin + rows.start * row)
    if goal.device.type == "cpu" and goal.dtype == dtype and goal.is_contiguous() and goal.shape[1:] == shape[1:]:
        fill(file, as_bytes(goal))
        return
    step = max(_CUT_BYTES // max(row, 1), 1)
    for start in range(0, goal.shape[0], step):
        some = goal[start:start + step]
        whole = torch.empty((some.shape[0], *shape[1:]), dtype=dtype)
        fill(file, as_bytes(whole))
        some.copy_(whole[:, part[1]] if len(part) == 2 else whole)


def _numbers_begin(file, item: Item) -> int:
    """The byte at which an item's numbers begin. They must be contiguous, which torch.save does not promise."""
    tensor = torch.load(Section(file, item.offset, item.length), map_location="meta", weights_only=True)
    if tuple(tensor.shape) != item.shape or tensor.dtype != item.dtype or not tensor.is_contiguous():
        raise RuntimeError(f"it is saved as {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
                           f"not as contiguous {item.dtype} {item.shape}")
    return (item.offset + tensor.untyped_storage()._checkpoint_offset
            + tensor.storage_offset() * item.dtype.itemsize)


def write_metadata(directory: Path, shapes: dict[str, tuple[int, ...]], items: Iterable[Item]) -> None:
    """Make the files of `items` a checkpoint: the file that DCP looks for first."""
    chunks, storage, dtypes = defaultdict(list), {}, {}
    for item in items:
        place = torch.Size(item.place)
        storage[MetadataIndex(item.name, place, len(chunks[item.name]))] = _StorageInfo(
            item.file, item.offset, item.length)
        chunks[item.name].append(ChunkStorageMetadata(place, torch.Size(item.shape)))
        dtypes[item.name] = item.dtype
    tensors = {name: TensorStorageMetadata(TensorProperties(dtype=dtypes[name]), torch.Size(shapes[name]), parts)
               for name, parts in chunks.items()}
    metadata = Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")
    with open(directory / METADATA, "wb") as file:
        pickle.dump(metadata, file)
