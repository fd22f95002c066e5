"""What a conversion reads from: the tensors of a model under Hugging Face's names, wherever they are stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_deepseek.checkpoint.convert.names import Place
from megatron_deepseek.checkpoint.dcp.files import DcpDirectory
from megatron_deepseek.checkpoint.dcp.item_reader import Reader, read
from megatron_deepseek.checkpoint.regions import Region
from megatron_deepseek.model.architecture.config import ModelConfig

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorSource(Protocol):
    """A model on disk.

    `shapes`, `dtypes`: of every tensor under its Hugging Face name; float8 means that `read_fp8` gives its parts.
    `copies`: further tensors that must equal another one, by name. `dropped`: what is stored and left out, and why.
    `absent_mtp`: MTP modules that were announced, of which no tensor is there (mtp.py).
    """

    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    copies: dict[str, str]
    dropped: dict[str, str]
    absent_mtp: int

    def files(self) -> list[Path]:
        """Everything that the tensors are read from."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, in the stored dtype; float8 weights as float32 values."""

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """The same rows as the bytes that are stored, in order; each block is overwritten by the next."""

    def read_fp8(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a float8 weight, and the scales of their blocks."""


@dataclass(frozen=True, eq=False)
class StackedSource:
    """A DCP directory whose parameters are the `places`' wholes, each under `prefix` and its name."""

    path: Path
    config: ModelConfig
    directory: DcpDirectory
    places: dict[str, Place]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    dropped: dict[str, str]
    copies: dict[str, str]
    prefix: str
    absent_mtp: int = 0

    def files(self) -> list[Path]:
        names = {item.file for items in self.directory.items.values() for item in items}
        return [self.path / ".metadata", *(self.path / name for name in sorted(names))]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = read(self.directory, *self._part(name, start, stop))
        return rows.view((stop - start, *self.places[name].shape[1:]))

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        with Reader(self.directory) as reader:
            yield from reader.numbers(*self._part(name, start, stop))

    def _part(self, name: str, start: int, stop: int) -> tuple[str, Region]:
        """The stored tensor that has rows start..stop of `name`, and where."""
        place = self.places[name]
        return self.prefix + place.whole, Region(*place.rows(start, stop)) if place.shape else Region(place.offset,
                                                                                                place.extent)

    def read_fp8(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("stacked checkpoints hold no float8 weights")


def open_stacked(path: Path, config: ModelConfig, directory: DcpDirectory, places: list[Place], prefix: str,
                 dropped: dict[str, str], padded: tuple[str, ...] = (), absent_mtp: int = 0) -> StackedSource:
    """ValueError where the directory lacks a tensor, has another one, or one of another shape.

    `dropped`: beginnings of the names that are left out, and why. `padded`: tensors that may have further rows.
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
