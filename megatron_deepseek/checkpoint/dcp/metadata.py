"""Reads .metadata of a torch.distributed.checkpoint directory, without the code that it names and in little memory.

The file is a pickle of DCP's classes. Unpickled by DCP an item takes a kilobyte, of which V3 with moments on 2,048
ranks has 350,000; importing DCP takes half a second; and a pickle may name any function to be called. Here every class
is one of the plain records below, and what is none of them and no plain value is read past (pickle_values.py).
"""

from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.checkpoint.dcp.pickle_values import OTHER, KnownInstance, read_pickle

METADATA = ".metadata"
_LARGEST = 1 << 30  # bytes: V3 with moments on 2,048 ranks has a tenth of that


class Metadata(KnownInstance):
    """`state_dict_metadata`: by name, a TensorEntry or something else that is no tensor; `storage_data`: StoredAt by
    Index.
    """

    __slots__ = ("state_dict_metadata", "storage_data")


class TensorEntry(KnownInstance):
    __slots__ = ("properties", "size", "chunks")


class Chunk(KnownInstance):
    __slots__ = ("offsets", "sizes")


class Index(KnownInstance):
    """A chunk of the tensor `fqn` by its place; two of one place are two, other than DCP's."""

    __slots__ = ("fqn", "offset")


class StoredAt(KnownInstance):
    __slots__ = ("relative_path", "offset", "length", "transform_descriptors")


class Properties(KnownInstance):
    """Of a tensor: its type, which DCP writes first."""

    __slots__ = ("dtype",)

    def fill(self, state: Any) -> None:
        if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
            raise ValueError("the properties of a tensor without its type")
        self.dtype = state[0]


_CLASSES = {"Metadata": Metadata, "TensorStorageMetadata": TensorEntry, "ChunkStorageMetadata": Chunk,
            "MetadataIndex": Index, "_StorageInfo": StoredAt, "TensorProperties": Properties}


def _known(module: str, name: str) -> Any:
    """See read_pickle."""
    if module == "torch":
        value = vars(torch).get(name)  # not getattr, which imports what is not there yet
        return tuple if name == "Size" else value if isinstance(value, torch.dtype) else OTHER
    if (module, name) == ("collections", "OrderedDict"):
        return dict
    return _CLASSES.get(name, OTHER) if module.startswith("torch.distributed.checkpoint.") else OTHER


def read_metadata(directory: Path) -> Metadata:
    """ValueError, with the file's name, unless it is a pickle of DCP's Metadata."""
    path = directory / METADATA
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ValueError(f"it has {size:,} bytes, more than the {_LARGEST:,} that are read of such a file")
        found = read_pickle(path.read_bytes(), _known)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata) or not all(isinstance(table, dict) for table in (found.state_dict_metadata,
                                                                                        found.storage_data)):
        raise ValueError(f"{path} cannot be read: it is no metadata of torch.distributed.checkpoint")
    return found
