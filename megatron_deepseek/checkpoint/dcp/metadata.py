"""Reading .metadata of a torch.distributed.checkpoint (DCP) directory safely, and in little memory.

The file is a pickle of DCP's classes. DCP's own unpickling takes a kilobyte for each item, of which V3 with moments on
2,048 ranks has 350,000. Importing DCP takes half a second, and a pickle may name any function to be called. Here each
of DCP's classes becomes one of the plain classes below; everything else that is no plain value is read past
(pickle_values.py).
"""

from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.checkpoint.dcp.pickle_values import OTHER, KnownInstance, read_pickle

METADATA = ".metadata"
_LARGEST = 1 << 30  # bytes; V3 with moments on 2,048 ranks has a tenth of that


class Metadata(KnownInstance):
    """The whole file: `state_dict_metadata` maps names to TensorEntry (or, for what is no tensor, anything else),
    `storage_data` maps Index to StoredAt.
    """

    __slots__ = ("state_dict_metadata", "storage_data")


class TensorEntry(KnownInstance):
    """DCP's TensorStorageMetadata: a tensor's Properties, its shape and its list of Chunk."""

    __slots__ = ("properties", "size", "chunks")


class Chunk(KnownInstance):
    """DCP's ChunkStorageMetadata: the region of a tensor in one item, by its place (`offsets`) and shape (`sizes`)."""

    __slots__ = ("offsets", "sizes")


class Index(KnownInstance):
    """DCP's MetadataIndex: a chunk of the tensor `fqn` by its place. Unlike DCP's, no two instances are equal."""

    __slots__ = ("fqn", "offset")


class StoredAt(KnownInstance):
    """DCP's _StorageInfo: the bytes offset..offset + length of a file in which a chunk is stored."""

    __slots__ = ("relative_path", "offset", "length", "transform_descriptors")


class Properties(KnownInstance):
    """DCP's TensorProperties, of which only the dtype is kept; DCP writes it first."""

    __slots__ = ("dtype",)

    def fill(self, state: Any) -> None:
        if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
            raise ValueError("the properties of a tensor without its type")
        self.dtype = state[0]


_CLASSES = {"Metadata": Metadata, "TensorStorageMetadata": TensorEntry, "ChunkStorageMetadata": Chunk,
            "MetadataIndex": Index, "_StorageInfo": StoredAt, "TensorProperties": Properties}


def _known(module: str, name: str) -> Any:
    """Return what a global of the pickle stands for; see `known` of read_pickle."""
    if module == "torch":
        value = vars(torch).get(name)  # not getattr, which imports submodules
        return tuple if name == "Size" else value if isinstance(value, torch.dtype) else OTHER
    if (module, name) == ("collections", "OrderedDict"):
        return dict
    return _CLASSES.get(name, OTHER) if module.startswith("torch.distributed.checkpoint.") else OTHER


def read_metadata(directory: Path) -> Metadata:
    """Read .metadata; raise ValueError, naming the file, unless it is a pickle of DCP's Metadata."""
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
