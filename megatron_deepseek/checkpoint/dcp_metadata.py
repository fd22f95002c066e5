"""Reads .metadata of a torch.distributed.checkpoint directory, without the code that it names and in little memory.

The file is a pickle of DCP's classes. Unpickled by DCP an item takes a kilobyte, of which V3 with moments on 2,048
ranks has 350,000; importing DCP takes half a second; and a pickle may name any function to be called. Here every class
is one of the plain records below, and what is none of them and no plain value is read past.
"""

import collections
import pickle
from pathlib import Path
from typing import Any

import torch

METADATA = ".metadata"


class _Record:
    """An instance of one of DCP's classes, with its attributes as far as they are of use."""

    __slots__ = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in self.__slots__:
            setattr(self, name, state.get(name))


class Metadata(_Record):
    """`state_dict_metadata`: by name, a TensorEntry or something else that is no tensor; `storage_data`: StoredAt by
    Index.
    """

    __slots__ = ("state_dict_metadata", "storage_data")


class TensorEntry(_Record):
    __slots__ = ("properties", "size", "chunks")


class Chunk(_Record):
    __slots__ = ("offsets", "sizes")


class Index(_Record):
    """A chunk of the tensor `fqn` by its place; two of one place are two, other than DCP's."""

    __slots__ = ("fqn", "offset")


class StoredAt(_Record):
    __slots__ = ("relative_path", "offset", "length", "transform_descriptors")


class Properties:
    """Of a tensor: its type, which DCP writes first."""

    __slots__ = ("dtype",)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = state[0]


class _Other:
    """Anything else: whatever it is made from and filled with is left out."""

    def __init__(self, *args, **kwargs):
        pass

    def _ignore(self, *args) -> None:
        pass

    __setstate__ = append = extend = add = update = __setitem__ = _ignore


_CLASSES = {"Metadata": Metadata, "TensorStorageMetadata": TensorEntry, "ChunkStorageMetadata": Chunk,
            "MetadataIndex": Index, "_StorageInfo": StoredAt, "TensorProperties": Properties}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            value = getattr(torch, name, None)
            return tuple if name == "Size" else value if isinstance(value, torch.dtype) else _Other
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return _CLASSES.get(name, _Other) if module.startswith("torch.distributed.checkpoint.") else _Other


def read_metadata(directory: Path) -> Metadata:
    """ValueError, with the file's name, unless it is a pickle of DCP's Metadata."""
    path = directory / METADATA
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # damaged bytes raise anything
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f"{path} cannot be read: it is no metadata of torch.distributed.checkpoint")
    return found
