"""Where the tensors are in a file of torch.save, found without running the code that its pickle names.

The file is a zip archive: data.pkl holds the values, and names the numbers of each storage by a persistent id, under
which they are an entry of their own, neither compressed nor changed. `weights_only=True` of torch.load refuses what
Megatron-LM puts beside its weights (an argparse.Namespace, enums, random states); here all of that is read past.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_deepseek.checkpoint.dcp.pickle_values import OTHER, KnownCall, KnownInstance, read_pickle

_LARGEST_PICKLE = 1 << 28  # bytes
_LOCAL_HEADER = 30  # bytes of a zip entry before its name
_DTYPES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
           "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
           "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
           "BoolStorage": torch.bool}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A contiguous tensor whose numbers, in row-major order, begin at byte `begin` of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage by its place: `count` numbers of `dtype` from byte `begin` on."""

    dtype: torch.dtype
    count: int
    begin: int


def read_torch_file(path: Path, classes: dict[tuple[str, str], type[KnownInstance]]) -> Any:
    """Return the value that torch.save wrote to `path`, each tensor as a StoredTensor.

    `classes` are those, by module and name, whose instances are wanted. Tensors that are not contiguous, and values
    that are neither plain nor of these classes, are OTHER. Raise ValueError, naming the file, if it is damaged.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            prefix = _prefix(file, entries)
            data = _content(file, entries[f"{prefix}data.pkl"], _LARGEST_PICKLE)
            return read_pickle(data, partial(_known, classes), partial(_storage, file, entries, prefix))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is no whole file of torch.save: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _prefix(file: Any, entries: dict[str, zipfile.ZipInfo]) -> str:
    """Return the name of the archive's one folder, with its slash; raise ValueError if there is none such."""
    found = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise ValueError("it holds no data.pkl, which torch.save writes since PyTorch 1.6")
    prefix = found[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and _content(file, order, 10) != b"little":
        raise ValueError("its numbers are not little-endian")
    return prefix


def _content(file: Any, entry: zipfile.ZipInfo, largest: int) -> bytes:
    """Return an entry's bytes. Its CRC-32 is not looked at: torch.save may leave it out."""
    if entry.file_size > largest or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes, more than {largest:,}, or is compressed")
    file.seek(_begin(file, entry))
    return file.read(entry.file_size)


def _storage(file: Any, entries: dict[str, zipfile.ZipInfo], prefix: str, identity: Any) -> Any:
    """Return the _Storage that a persistent id names: ("storage", its type, its key, a device, how many numbers)."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("a persistent id that names no storage")
    _, dtype, key, _, count = identity
    entry = entries.get(f"{prefix}data/{key}") if isinstance(key, str) else None
    if not isinstance(dtype, torch.dtype) or entry is None:
        return OTHER
    if type(count) is not int or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < count * dtype.itemsize:
        raise ValueError(f"storage {key} has {entry.file_size:,} bytes, too few for {count!r:.20} numbers of {dtype}")
    return _Storage(dtype, entry.file_size // dtype.itemsize, _begin(file, entry))


def _begin(file: Any, entry: zipfile.ZipInfo) -> int:
    """Return the byte of the file at which an entry's content begins: its own header says how long that is."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{entry.filename} has no header where it should be")
    lengths = (int.from_bytes(header[at:at + 2], "little") for at in (26, 28))
    return entry.header_offset + _LOCAL_HEADER + sum(lengths)


def _known(classes: dict[tuple[str, str], type[KnownInstance]], module: str, name: str) -> Any:
    """Return what a global of the pickle stands for; see `known` of read_pickle."""
    if (module, name) in classes:
        return classes[module, name]
    if (module, name) in _CALLS:
        return _CALLS[module, name]
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    return {("collections", "OrderedDict"): dict, ("torch", "Size"): tuple}.get((module, name), OTHER)


def _tensor(arguments: tuple) -> Any:
    """Return the tensor that torch._utils._rebuild_tensor_v2 would make: (storage, offset, size, stride, ...)."""
    storage, offset, size, stride, *_ = arguments
    if not isinstance(storage, _Storage):
        return OTHER
    if not all(type(numbers) is tuple and set(map(type, numbers)) <= {int} for numbers in (size, stride, (offset,))):
        raise ValueError("a tensor without a size")
    if min((*size, offset)) < 0 or offset + prod(size) > storage.count:
        raise ValueError(f"a tensor of shape {size} beyond the {storage.count:,} numbers of its storage")
    if not _contiguous(size, stride):
        return OTHER
    return StoredTensor(storage.dtype, size, storage.begin + offset * storage.dtype.itemsize)


def _contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether a tensor's numbers lie in row-major order; the stride of a dimension of 1 says nothing."""
    return len(size) == len(stride) and all(length == 1 or step == prod(size[dim + 1:])
                                            for dim, (length, step) in enumerate(zip(size, stride)))


def _first(arguments: tuple) -> Any:
    return arguments[0]


_CALLS: dict[tuple[str, str], Callable | KnownCall] = {
    ("torch._utils", "_rebuild_tensor_v2"): KnownCall(_tensor),
    ("torch._utils", "_rebuild_parameter"): KnownCall(_first)}
