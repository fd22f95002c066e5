"""What a conversion reads from: a model's tensors under Hugging Face's names, in whatever format they are stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_deepseek.checkpoint.convert.names import Place
from megatron_deepseek.checkpoint.dcp.files import StoredTensors
from megatron_deepseek.checkpoint.dcp.item_reader import ItemReader, read
from megatron_deepseek.checkpoint.safetensors_file import as_bytes
from megatron_deepseek.model.architecture.config import ModelConfig

_TRANSPOSED_BYTES = 1 << 24  # so much is turned at a time of weights that are stored transposed
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorSource(Protocol):
    """A model on disk.

    `shapes` and `dtypes` are those of every tensor, under its Hugging Face name; `read_fp8` reads the float8 ones with
    their scales. `copies` maps further stored tensors to the one that each must equal. `dropped` maps what is stored
    and left out to the reason. `absent_mtp` is the number of MTP modules that config.json announces while no tensor of
    any is stored (mtp.py).
    """

    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    copies: dict[str, str]
    dropped: dict[str, str]
    absent_mtp: int

    def files(self) -> list[Path]:
        """Return every file that the tensors are read from."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows start..stop in the stored dtype; float8 weights as float32 values."""

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """Yield the stored bytes of rows start..stop in order; each block is overwritten by the next."""

    def read_fp8(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read rows start..stop of a float8 weight, and the scales of their blocks of 128 x 128."""


@dataclass(frozen=True, eq=False)
class StackedSource:
    """Stored tensors that are stacked parameters, `prefix` before their names, as a TensorSource.

    `places` says by Hugging Face's name which part of which stacked parameter a tensor is.
    """

    path: Path
    config: ModelConfig
    directory: StoredTensors
    places: dict[str, Place]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    dropped: dict[str, str]
    copies: dict[str, str]
    prefix: str
    absent_mtp: int = 0

    def files(self) -> list[Path]:
        return self.directory.files()

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        place = self.places[name]
        dims = len(place.shape)
        parts = [read(self.directory, self.prefix + place.whole, region) for region in place.regions(start, stop)]
        parts = [part.view(part.shape[part.ndim - dims:]) for part in parts]
        if place.transposed:
            parts = [part.T.contiguous() for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        place = self.places[name]
        if place.transposed:
            step = max(1, _TRANSPOSED_BYTES // (place.shape[1] * self.dtypes[name].itemsize))
            for first in range(start, stop, step):
                yield as_bytes(self.read(name, first, min(first + step, stop)))
            return
        with ItemReader(self.directory) as reader:
            for region in place.regions(start, stop):
                yield from reader.numbers(self.prefix + place.whole, region)

    def read_fp8(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("stacked checkpoints hold no float8 weights")


def open_stacked(path: Path, config: ModelConfig, directory: StoredTensors, places: list[Place], prefix: str,
                 dropped: dict[str, str], padded: tuple[str, ...] = (), absent_mtp: int = 0) -> StackedSource:
    """Open a DCP directory of stacked parameters as a source.

    Raise ValueError if it lacks a tensor, has an unknown one, or one of another shape. `dropped` maps beginnings of
    names that are left out to the reason. Tensors named in `padded` may have further rows.
    """
    wholes = {prefix + place.whole: place.whole_shape for place in places}
    left_out = {name: reason for name in directory.shapes for start, reason in dropped.items()
                if name not in wholes and name.startswith(start)}
    unknown = sorted(set(directory.shapes) - set(wholes) - set(left_out))
    missing = sorted(set(wholes) - set(directory.shapes))
    for names, what in ((missing, "lacks"), (unknown, "has, unknown to this architecture,")):
        if names:
            raise ValueError(f"{path} {what} {len(names)} tensor{'s' * (len(names) > 1)}, first {names[0]}")
    for name, shape in wholes.items():
        found = directory.shapes[name]
        if found != shape and not (name in padded and found[1:] == shape[1:] and found[0] > shape[0]):
            raise ValueError(f"{path}: {name} has shape {directory.shapes[name]}, config.json says {shape}")
        if directory.dtypes[name] not in FLOATS:
            raise ValueError(f"{path}: {name} is of type {directory.dtypes[name]}, no floating-point number")
    return StackedSource(path, config, directory, {place.name: place for place in places},
                         {place.name: place.shape for place in places},
                         {place.name: directory.dtypes[prefix + place.whole] for place in places}, left_out, {}, prefix,
                         absent_mtp)
