"""Writing .metadata of a torch.distributed.checkpoint (DCP) directory: a pickle of its Metadata, an entry at a time.

DCP's objects, and what pickle remembers of them, take 1.4 KB for each item, half a gigabyte for V3 with moments on
2,048 ranks, and importing DCP takes half a second. Here texts, sizes and chunks that occur again are written once and
remembered; everything else is written and forgotten. Unpickled, the result equals DCP's own.
"""

import pickle
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from struct import pack
from typing import Any, BinaryIO

import torch

from megatron_deepseek.checkpoint.dcp.files import Item
from megatron_deepseek.checkpoint.dcp.metadata import METADATA

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
_VERSION = "1.0.0"


def write_metadata(directory: Path, shapes: dict[str, tuple[int, ...]], items: Sequence[Item]) -> None:
    """Write .metadata, which makes files of `items` a DCP checkpoint; tensors come in the order of `shapes`."""
    items_of = defaultdict(list)
    for item in items:
        items_of[item.name].append(item)
    with open(directory / METADATA, "wb") as file:
        to = _Pickle(file)
        to.instance(_METADATA_MODULE, "Metadata", {
            "state_dict_metadata": lambda: to.mapping((name, lambda: _tensor(to, shape, items_of[name]))
                                                      for name, shape in shapes.items() if name in items_of),
            "planner_data": None,
            "storage_data": lambda: to.mapping((lambda: _index(to, item, number), lambda: _stored(to, item))
                                               for stored in items_of.values() for number, item in enumerate(stored)),
            "storage_meta": lambda: to.instance(_METADATA_MODULE, "StorageMeta", dict.fromkeys(
                ("checkpoint_id", "save_id", "load_id")) | {"modules": lambda: to.listing(())}),
            "version": _VERSION})
        file.write(pickle.STOP)


def _tensor(to: "_Pickle", shape: tuple[int, ...], items: list[Item]) -> None:
    to.instance(_METADATA_MODULE, "TensorStorageMetadata", {
        "properties": lambda: to.shared(("properties", items[0].dtype), lambda: _properties(to, items[0].dtype)),
        "size": shape,
        "chunks": lambda: to.listing(lambda: _chunk(to, item) for item in items)})


def _properties(to: "_Pickle", dtype: torch.dtype) -> None:
    """Write a TensorProperties, whose state is a tuple: dtype, layout, requires_grad, memory format, pin_memory."""
    to.new(_METADATA_MODULE, "TensorProperties")
    to.write(pickle.MARK)
    to.type("torch", str(dtype).removeprefix("torch."))
    to.call("torch.serialization", "_get_layout", "torch.strided")
    to.write(pickle.NEWFALSE)
    to.call(_METADATA_MODULE, "_MEM_FORMAT_ENCODING", 0)
    to.write(pickle.NEWFALSE + pickle.TUPLE + pickle.BUILD)


def _chunk(to: "_Pickle", item: Item) -> None:
    to.shared(("chunk", item.place, item.shape), lambda: to.instance(
        _METADATA_MODULE, "ChunkStorageMetadata", {"offsets": item.place, "sizes": item.shape}))


def _index(to: "_Pickle", item: Item, number: int) -> None:
    to.instance(_METADATA_MODULE, "MetadataIndex", {"fqn": item.name, "index": number, "offset": item.place})


def _stored(to: "_Pickle", item: Item) -> None:
    to.instance(_STORAGE_MODULE, "_StorageInfo",
                {"relative_path": item.file, "offset": item.offset, "length": item.length})


class _Pickle:
    """A pickle of protocol 4, written value by value.

    A value is None, a text, a number, a torch.Size (given as a tuple of numbers), or a function that writes it.
    """

    def __init__(self, file: BinaryIO):
        self.write = file.write
        self._known: dict[Hashable, int] = {}
        self.write(pickle.PROTO + bytes([4]))

    def shared(self, key: Hashable, write: Callable[[], None]) -> None:
        """Call `write`, or write a reference to what it wrote if `key` was written before."""
        if key in self._known:
            self.write(pickle.LONG_BINGET + pack("<I", self._known[key]))
            return
        write()
        self.write(pickle.MEMOIZE)
        self._known[key] = len(self._known)

    def value(self, value: Any) -> None:
        if callable(value):
            value()
        elif value is None:
            self.write(pickle.NONE)
        elif isinstance(value, str):
            self.shared(value, lambda: self._text(value.encode()))
        elif isinstance(value, tuple):
            self.shared(value, lambda: self._size(value))
        elif value < 1 << 31:
            self.write(pickle.BININT + pack("<i", value))
        else:
            digits = pickle.encode_long(value)
            self.write(pickle.LONG1 + bytes([len(digits)]) + digits)

    def type(self, module: str, name: str) -> None:
        """Write a class or function of a module."""
        self.shared(("type", module, name), lambda: (self.value(module), self.value(name),
                                                     self.write(pickle.STACK_GLOBAL)))

    def call(self, module: str, name: str, argument: Any) -> None:
        """Write the result of calling a function of a module, or a class, with one argument."""
        self.type(module, name)
        self.value(argument)
        self.write(pickle.TUPLE1 + pickle.REDUCE)

    def new(self, module: str, name: str) -> None:
        """Write an instance of a class, without its state yet."""
        self.type(module, name)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)

    def instance(self, module: str, name: str, attributes: dict[str, Any]) -> None:
        """Write an instance of a class with its attributes."""
        self.new(module, name)
        self.mapping(attributes.items())
        self.write(pickle.BUILD)

    def mapping(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        self.write(pickle.EMPTY_DICT)
        for key, value in pairs:
            self.value(key)
            self.value(value)
            self.write(pickle.SETITEM)

    def listing(self, values: Iterable[Any]) -> None:
        self.write(pickle.EMPTY_LIST)
        for value in values:
            self.value(value)
            self.write(pickle.APPEND)

    def _text(self, text: bytes) -> None:
        self.write(pickle.BINUNICODE + pack("<I", len(text)) + text)

    def _size(self, numbers: tuple[int, ...]) -> None:
        self.type("torch", "Size")
        self.write(pickle.MARK)
        for number in numbers:
            self.value(number)
        self.write(pickle.TUPLE + pickle.TUPLE1 + pickle.REDUCE)
