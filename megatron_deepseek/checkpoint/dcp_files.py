"""What is where in a torch.distributed.checkpoint (DCP) directory.

Tensors are stored in items, each a part of a tensor and a zip file of torch.save inside a larger file. dcp_reader.py
reads any part of them, item_file.py writes files of them, and the metadata written here makes those DCP's own.
"""

import bisect
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
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

from megatron_deepseek.checkpoint.boxes import Box

METADATA = ".metadata"


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

    @cached_property
    def box(self) -> Box:
        return Box(self.place, self.shape)


class DcpDirectory:
    """What .metadata says: `shapes`, `dtypes` and `items` of tensors by name, the items in order of their place.

    `begins`: where the numbers of items begin, by file and offset, as far as dcp_reader.py has looked.
    """

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
        self.begins: dict[tuple[str, int], int] = {}
        self._starts = {name: [item.place[:1] for item in items] for name, items in self.items.items()}
        self._longest = {name: max((item.shape[0] for item in items if item.shape), default=0)
                         for name, items in self.items.items()}

    def _items(self, tensors: dict, storage: dict) -> dict[str, list[Item]]:
        """Each tensor's items in the order of their first dimension. Equal places, of which there are many in a model
        of equal layers, share their memory.
        """
        items, plain = defaultdict(list), lru_cache(maxsize=None)(tuple)
        for name, entry in tensors.items():
            for chunk in entry.chunks:
                info = storage.get(MetadataIndex(name, chunk.offsets))
                if info is None:
                    raise ValueError(f"{self.directory / METADATA} does not say where {name} at "
                                     f"{tuple(chunk.offsets)} is")
                if getattr(info, "transform_descriptors", None):
                    raise ValueError(f"{self.directory / info.relative_path}: {name} is stored compressed, "
                                     f"which is not supported")
                items[name].append(Item(name, plain(chunk.offsets), plain(chunk.sizes), entry.properties.dtype,
                                        info.relative_path, info.offset, info.length))
            items[name].sort(key=lambda item: item.place)
        return items

    def check_files(self) -> None:
        """ValueError unless every file that an item needs is there, and long enough."""
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

    def covering(self, name: str, box: Box) -> list[Item]:
        """The items that hold numbers of `box`. ValueError unless they hold all of them."""
        items = [item for item in self._near(name, box) if item.box.overlap(box)]
        found = sum(item.box.overlap(box).numel for item in items)
        if found != box.numel:
            raise ValueError(f"{self.directory}: {name} has only {found} of the {box.numel} numbers at {box.place} of "
                             f"shape {box.shape}")
        return items

    def _near(self, name: str, box: Box) -> list[Item]:
        """Items that begin before the end of the part along the first dimension, without those long before it."""
        items = self.items[name]
        if not box.place:
            return items
        starts = self._starts[name]
        first = bisect.bisect_right(starts, (box.place[0] - self._longest[name],))
        return items[first:bisect.bisect_left(starts, box.end[:1])]


def open_dcp(directory: Path) -> DcpDirectory:
    """ValueError, with the file and a tensor in it, where something is missing or truncated."""
    opened = DcpDirectory(directory)
    opened.check_files()
    return opened


def write_metadata(directory: Path, shapes: dict[str, tuple[int, ...]], items: Iterable[Item]) -> None:
    """Make the files of `items` a checkpoint: the file that DCP looks for first, tensors in the order of `shapes`."""
    chunks, storage, dtypes = defaultdict(list), {}, {}
    size = lru_cache(maxsize=None)(torch.Size)  # shared by the parts of equal layers: hundreds of thousands are alike
    chunk = lru_cache(maxsize=None)(ChunkStorageMetadata)
    for item in items:
        place = size(item.place)
        storage[MetadataIndex(item.name, place, len(chunks[item.name]))] = _StorageInfo(
            item.file, item.offset, item.length)
        chunks[item.name].append(chunk(place, size(item.shape)))
        dtypes[item.name] = item.dtype
    tensors = {name: TensorStorageMetadata(TensorProperties(dtype=dtypes[name]), torch.Size(shape), chunks[name])
               for name, shape in shapes.items() if name in chunks}
    metadata = Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")
    with open(directory / METADATA, "wb") as file:
        pickle.dump(metadata, file)
