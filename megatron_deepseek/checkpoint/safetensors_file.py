"""Safetensors files, read and written a few rows at a time.

The library maps whole files into memory, which fails if `ulimit -v` is below a file's size, and writes from a
dictionary that holds every tensor of the file. Conversion wants neither, and the format is simple: a length, a JSON
header and the bytes (github.com/huggingface/safetensors, README, "Format"). Everything that the library refuses is
refused here as well.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_deepseek.checkpoint import raw_bytes
from megatron_deepseek.foreign_json import JsonObject, parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32,
          "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its bytes begin at `offset`, counted from the beginning of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Raise ValueError, naming file and tensor, unless the tensors' bytes fill the file without gap or overlap.
    """
    try:
        header, begin, size = _raw_header(path)
    except struct.error as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: it has fewer than 8 bytes") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    spans = {name: _span(path, name, header) for name in header.fields if name != "__metadata__"}
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise ValueError(f"{path}: {name} begins at byte {start} of the data, where {end} was expected")
        if begin + stop > size:
            raise ValueError(f"{path} is truncated: {name} ends at byte {begin + stop}, the file at {size}")
        end = stop
    if begin + end != size:
        raise ValueError(f"{path} has {size - begin - end} bytes after its last tensor")
    entries = {name: header.fields[name] for name in spans}
    return {name: StoredTensor(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path, begin + spans[name][0])
            for name, entry in entries.items()}


def _raw_header(path: Path) -> tuple[JsonObject, int, int]:
    """Return the parsed header, the byte at which the data begins, and the file's size."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{path} is truncated or no safetensors file: its header should have {length} bytes, "
                             f"the file has {size}")
        header = file.read(length)
    if header[:1] != b"{":
        raise ValueError(f"{path} is no safetensors file, or a damaged one: its header begins with {header[:1]!r}")
    return JsonObject.of(parse_json(header, f"the header of {path}"), f"the header of {path}"), 8 + length, size


def _span(path: Path, name: str, header: JsonObject) -> tuple[int, int]:
    """Return where a tensor begins and ends in the data; raise ValueError unless its type and shape agree."""
    if not name.isprintable():
        raise ValueError(f"{header.where} has a tensor {name!r}, which is no name")
    entry = header.object(name)
    offsets, shape, dtype = entry.integers("data_offsets"), entry.integers("shape"), entry.text("dtype")
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {name} is of type {dtype!r}, which is not one of {', '.join(DTYPES)}")
    if len(offsets) != 2:
        raise entry.fault("data_offsets", "not the two of begin and end")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"{path}: {name} has {offsets[1] - offsets[0]} bytes, its shape {list(shape)} of {dtype} "
                         f"needs {needed}")
    return offsets[0], offsets[1]


def read_rows(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Read rows start..stop of the first dimension; a scalar is read whole."""
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    out = torch.empty(shape, dtype=tensor.dtype)
    with _reading(tensor) as descriptor:
        raw_bytes.fill(descriptor, as_bytes(out), tensor.offset + start * tensor.row_bytes)
    return out


def stream_rows(tensor: StoredTensor, start: int, stop: int) -> Iterator[memoryview]:
    """Yield the bytes of rows start..stop in blocks, each overwritten by the next; a scalar's bytes are all read."""
    with _reading(tensor) as descriptor:
        yield from raw_bytes.blocks(descriptor, tensor.offset + start * tensor.row_bytes,
                                    (stop - start) * tensor.row_bytes)


@contextmanager
def _reading(tensor: StoredTensor) -> Iterator[int]:
    """Open the tensor's file; raise ValueError, naming tensor and file, if it cannot be read."""
    try:
        with open(tensor.file, "rb", buffering=0) as file:
            yield file.fileno()
    except (OSError, EOFError) as error:
        raise ValueError(f"{tensor.file}: {tensor.name} cannot be read: {error}") from error


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's memory as bytes, since NumPy knows neither bfloat16 nor float8."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def lay_out(path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> tuple[bytes, list[StoredTensor]]:
    """Return the header of a new file and where each tensor goes. Wide types come first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        starts[name], nbytes = end, math.prod(shape) * dtype.itemsize
        end += nbytes
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end - nbytes, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    placed = [StoredTensor(name, tensors[name][0], tuple(tensors[name][1]), path, begin + starts[name])
              for name in order]
    return struct.pack("<Q", len(text)) + text, placed
