"""What is where in a torch.distributed.checkpoint (DCP) directory, as its .metadata says and as it was checked.

Tensors are stored in items. An item holds a region of one tensor, as the zip file that torch.save writes, inside a
larger file. item_reader.py reads any region from items, item_file.py writes files of items, and metadata_writer.py
writes the .metadata by which DCP finds them.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.checkpoint.dcp.metadata import (
    METADATA,
    Chunk,
    Index,
    Properties,
    StoredAt,
    TensorEntry,
    read_metadata,
)
from megatron_deepseek.checkpoint.integrity import is_inside, read_checksums, verify_files
from megatron_deepseek.parallel.regions import Region, fill_once

_MOST_DIMENSIONS = 8
_LARGEST = 1 << 62  # the largest size, or position in a file, that is believed
_FEW_CHUNKS = 1 << 18  # so many are checked in a second


@dataclass(frozen=True, slots=True)
class Item:
    """A region of the tensor `name`, at bytes offset..offset + length of `file`.

    They are what torch.save wrote of it, which is longer than the numbers; or, where `length` is exactly theirs, bare
    numbers in row-major order. `place` and `shape` are the region's. There are hundreds of thousands of items, so
    `DcpDirectory` and fingerprints.py let them share equal tuples and texts.
    """

    name: str
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int

    @property
    def region(self) -> Region:
        return Region(self.place, self.shape)


class StoredTensors:
    """Tensors in items of files of `directory`: their `shapes`, `dtypes` and `items` by name, items in order of place.

    `index_files` are those that say so. `begins` is the memory of item_reader.py: the byte at which an item's numbers
    begin, by file and offset.
    """

    def __init__(self, directory: Path, index_files: list[Path], shapes: dict[str, tuple[int, ...]],
                 dtypes: dict[str, torch.dtype], items: dict[str, list[Item]]):
        self.directory, self.index_files = directory, index_files
        self.shapes, self.dtypes, self.items = shapes, dtypes, items
        self.begins: dict[tuple[str, int], int] = {}
        self._longest = {name: max((item.shape[0] for item in items if item.shape), default=0)
                         for name, items in self.items.items()}

    def files(self) -> list[Path]:
        """Return every file that is read to get the tensors."""
        names = {item.file for items in self.items.values() for item in items}
        return [*self.index_files, *(self.directory / name for name in sorted(names))]

    def check_files(self) -> None:
        """Raise ValueError unless every file that an item is in is there, and long enough."""
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

    def covering(self, name: str, region: Region) -> list[Item]:
        """Return the items that hold numbers of `region`; raise ValueError unless they hold all of them."""
        items = [item for item in self._near(name, region) if item.region.overlap(region)]
        found = sum(item.region.overlap(region).numel for item in items)
        if found != region.numel:
            raise ValueError(f"{self.directory}: {name} has only {found} of the {region.numel} numbers at "
                             f"{region.place} of shape {region.shape}")
        return items

    def _near(self, name: str, region: Region) -> list[Item]:
        """Return the items that begin before the end of `region` along the first dimension, but not long before it."""
        items = self.items[name]
        if not region.place:
            return items
        first = bisect_right(items, region.place[0] - self._longest[name], key=_row)
        return items[first:bisect_left(items, region.end[0], key=_row)]


class DcpDirectory(StoredTensors):
    """The tensors of a DCP directory, as .metadata says; `others` are the names of stored values that are no tensors.

    Raise ValueError if .metadata is damaged or contradicts itself.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._check_checksum()
        metadata = read_metadata(self.directory)
        tensors = {name: entry for name, entry in metadata.state_dict_metadata.items()
                   if isinstance(entry, TensorEntry)}
        self.others = frozenset(metadata.state_dict_metadata) - frozenset(tensors)
        self._check_number(tensors, len(metadata.storage_data))
        fills = cache(_fills)  # layers are alike, so the same shapes and chunks come again and again
        for name, entry in tensors.items():
            self._check(name, entry, fills)
        items = self._items(tensors, {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()
                                      if isinstance(index, Index) and isinstance(index.fqn, str)
                                      and _is_size(index.offset)})
        super().__init__(self.directory, [self.directory / METADATA],
                         {name: entry.size for name, entry in tensors.items()},
                         {name: entry.properties.dtype for name, entry in tensors.items()}, items)

    def _check_checksum(self) -> None:
        """Raise ValueError if .metadata has changed since its checksum was taken, before anything in it is believed."""
        listing = read_checksums(self.directory) or {}
        for damage in verify_files(self.directory, listing, [METADATA] if METADATA in listing else []):
            raise ValueError(f"{self.directory}/{damage}")

    def _check_number(self, tensors: dict[Any, TensorEntry], stored: int) -> None:
        """Raise ValueError for more chunks than there are items `stored`.

        A pickle can name one list of chunks for all of its tensors, and checking them would then take the square of
        its length.
        """
        chunks = sum(len(entry.chunks) for entry in tensors.values() if isinstance(entry.chunks, list))
        if chunks > max(stored, _FEW_CHUNKS):
            raise ValueError(f"{self.directory / METADATA} has {chunks:,} chunks of tensors, but says of "
                             f"{stored:,} only where they are")

    def _check(self, name: Any, entry: TensorEntry, fills: Callable[..., bool]) -> None:
        """Raise ValueError unless an entry has the right types, and its chunks hold each number of the tensor once."""
        path = self.directory / METADATA
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{path} has a tensor {name!r:.60}, which is no name")
        if not isinstance(entry.properties, Properties) or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{path} does not say the type of {name}")
        if not _is_size(entry.size) or not isinstance(entry.chunks, list) or not all(
                isinstance(chunk, Chunk) and _is_size(chunk.offsets) and _is_size(chunk.sizes)
                and len(chunk.offsets) == len(chunk.sizes) == len(entry.size) for chunk in entry.chunks):
            raise ValueError(f"{path} does not say the shapes of {name} and of its chunks")
        if not fills(entry.size, tuple([(chunk.offsets, chunk.sizes) for chunk in entry.chunks])):
            raise ValueError(f"{path}: the chunks of {name} do not hold each number of its shape {entry.size} once")

    def _items(self, tensors: dict[str, TensorEntry],
               storage: dict[tuple[str, tuple[int, ...]], StoredAt]) -> dict[str, list[Item]]:
        """Return each tensor's items in the order of their place.

        Equal places and shapes, of which a model of equal layers has many, share their memory.
        """
        items, shared, inside = defaultdict(list), cache(tuple), cache(is_inside)
        for name, entry in tensors.items():
            for chunk in entry.chunks:
                info = storage.get((name, chunk.offsets))
                if not isinstance(info, StoredAt):
                    raise ValueError(f"{self.directory / METADATA} does not say where {name} at "
                                     f"{chunk.offsets} is")
                nbytes = prod(chunk.sizes) * entry.properties.dtype.itemsize
                if not (isinstance(info.relative_path, str) and inside(info.relative_path) and _is_size(
                        (info.offset, info.length)) and info.length > nbytes):
                    raise ValueError(f"{self.directory / METADATA}: the {nbytes} bytes of {name} at {chunk.offsets} "
                                     f"cannot be where it says they are")
                if info.transform_descriptors:
                    raise ValueError(f"{self.directory / info.relative_path}: {name} is stored compressed, "
                                     f"which is not supported")
                items[name].append(Item(name, shared(chunk.offsets), shared(chunk.sizes), entry.properties.dtype,
                                        info.relative_path, info.offset, info.length))
            items[name].sort(key=lambda item: item.place)
        return items


def _is_size(value: Any) -> bool:
    """Return whether `value` is a tuple of a few integers that can be a shape, a place or positions in a file."""
    return (type(value) is tuple and len(value) <= _MOST_DIMENSIONS and set(map(type, value)) <= {int}
            and (not value or min(value) >= 0 and max(value) <= _LARGEST))


def _fills(size: tuple[int, ...], chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> bool:
    return fill_once(Region((0,) * len(size), size), [Region(*chunk) for chunk in chunks])


def _row(item: Item) -> int:
    return item.place[0]


def open_dcp(directory: Path) -> DcpDirectory:
    """Open a DCP directory; raise ValueError, naming a file and a tensor in it, if one is missing or truncated."""
    refuse_legacy(directory)
    opened = DcpDirectory(directory)
    opened.check_files()
    return opened


def refuse_megatron(directory: Path) -> None:
    """Raise ValueError for an iteration of Megatron-LM, known by its lack of a config.json."""
    refuse_legacy(directory)
    if (directory / METADATA).exists() and not (directory / "config.json").exists():
        raise ValueError(f"{directory} has no config.json, as checkpoints of Megatron-LM have none: "
                         "tools/convert_checkpoint.py --from megatron --to native makes one of it to begin from")


def refuse_legacy(directory: Path) -> None:
    """Raise ValueError for Megatron-LM's legacy format: each rank's weights in a file of its own, by torch.save."""
    if not (directory / METADATA).exists() and any(directory.glob("mp_rank_*")):
        raise ValueError(f"{directory} is in Megatron-LM's legacy format, a file for each rank (mp_rank_XX): "
                         f"tools/convert_checkpoint.py --from megatron --to native makes a checkpoint of it to begin "
                         f"from")
