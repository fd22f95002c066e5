"""What is where in a torch.distributed.checkpoint (DCP) directory.

Tensors are stored in items, each a part of a tensor and a zip file of torch.save inside a larger file. dcp_reader.py
reads any part of them, item_file.py writes files of them, and dcp_metadata_writer.py makes those DCP's own.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.boxes import Box
from megatron_deepseek.checkpoint.dcp_metadata import METADATA, StoredAt, TensorEntry, read_metadata


@dataclass(frozen=True, slots=True)
class Item:
    """A part of the tensor `name`, saved by torch.save at bytes offset..offset + length of `file`.

    There are hundreds of thousands: `items_of` and `records.py` let them share what is equal.
    """

    name: str
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int

    @property
    def box(self) -> Box:
        return Box(self.place, self.shape)


class DcpDirectory:
    """What .metadata says: `shapes`, `dtypes` and `items` of tensors by name, the items in order of their place.

    `begins`: where the numbers of items begin, by file and offset, as dcp_reader.py remembers it.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        metadata = read_metadata(self.directory)
        tensors = {name: entry for name, entry in metadata.state_dict_metadata.items()
                   if isinstance(entry, TensorEntry)}
        self.shapes = {name: entry.size for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}
        self.items = self._items(tensors, {(index.fqn, index.offset): info
                                           for index, info in metadata.storage_data.items()})
        self.begins: dict[tuple[str, int], int] = {}
        self._longest = {name: max((item.shape[0] for item in items if item.shape), default=0)
                         for name, items in self.items.items()}

    def _items(self, tensors: dict[str, TensorEntry],
               storage: dict[tuple[str, tuple[int, ...]], StoredAt]) -> dict[str, list[Item]]:
        """Each tensor's items in the order of their first dimension. Equal places, of which there are many in a model
        of equal layers, share their memory.
        """
        items, shared = defaultdict(list), cache(tuple)
        for name, entry in tensors.items():
            for chunk in entry.chunks:
                info = storage.get((name, chunk.offsets))
                if info is None:
                    raise ValueError(f"{self.directory / METADATA} does not say where {name} at "
                                     f"{chunk.offsets} is")
                if info.transform_descriptors:
                    raise ValueError(f"{self.directory / info.relative_path}: {name} is stored compressed, "
                                     f"which is not supported")
                items[name].append(Item(name, shared(chunk.offsets), shared(chunk.sizes), entry.properties.dtype,
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
        first = bisect_right(items, box.place[0] - self._longest[name], key=_row)
        return items[first:bisect_left(items, box.end[0], key=_row)]


def _row(item: Item) -> int:
    return item.place[0]


def open_dcp(directory: Path) -> DcpDirectory:
    """ValueError, with the file and a tensor in it, where something is missing or truncated."""
    opened = DcpDirectory(directory)
    opened.check_files()
    return opened
