"""Writing one file of a conversion's output, safetensors or DCP items, from blocks of rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import xxhash

from megatron_deepseek.checkpoint.convert.block_fp8 import BLOCK, SCALE_SUFFIX, scale_shape
from megatron_deepseek.checkpoint.convert.blocks import OutputTensor, cast_rows, stream_bytes
from megatron_deepseek.checkpoint.convert.names import Place
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.dcp.item_file import FileWriter, ItemRegion, split, write_items
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.safetensors_file import as_bytes, lay_out

class HasBytes(Protocol):
    """Something that takes `nbytes` in a file."""

    @property
    def nbytes(self) -> int:
        ...


class WrittenTensor(HasBytes, Protocol):
    """A tensor to write, in whatever format: its name there, the source's tensor that it is made of first, its type.

    `layer`: the layer that it belongs to, None for embedding, last norm and head.
    """

    name: str

    @property
    def original(self) -> str | None:
        ...

    @property
    def dtype(self) -> object:
        ...

    @property
    def layer(self) -> int | None:
        ...


T = TypeVar("T", bound=HasBytes)


@dataclass(frozen=True)
class OutputFile:
    """A file to write and the tensors in it, in order."""

    name: str
    tensors: tuple[WrittenTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def write_safetensors(path: Path, file: OutputFile, source: TensorSource, advance: Callable[[int], None]
                      ) -> Fingerprint:
    """Write a safetensors file to `path` and return its fingerprint.

    Each block goes straight to its position, float8 weights and their scales to different ones; so every tensor has a
    byte range and a digest of its own.
    """
    types: dict = {}
    for tensor in file.tensors:
        types[tensor.name] = tensor.dtype, tensor.shape
        if tensor.dtype == torch.float8_e4m3fn:
            types[tensor.name + SCALE_SUFFIX] = torch.float32, scale_shape(tensor.shape)
    header, stored = lay_out(path, types)
    offsets, digests = {each.name: each.offset for each in stored}, {name: xxhash.xxh3_128() for name in types}
    with FileWriter(path) as writer:
        writer.write(header)
        for tensor in sorted(file.tensors, key=lambda tensor: offsets[tensor.name]):
            writer.tensor = tensor.name
            for name, begin, data in _stored_bytes(source, tensor):
                writer.write_at(offsets[name] + begin, data)
                digests[name].update(data)
                advance(len(data))
    ranges = [(0, len(header), writer.checksum.result().digest)]
    ranges += [(each.offset, each.nbytes, digests[each.name].hexdigest()) for each in stored]
    return Fingerprint(stored[-1].offset + stored[-1].nbytes, ranges)


def _stored_bytes(source: TensorSource, tensor: OutputTensor) -> Iterator[tuple[str, int, memoryview]]:
    """Yield (stored tensor, byte in it, bytes); for float8, rows and the scales of their blocks in turn."""
    if tensor.dtype != torch.float8_e4m3fn:
        begin = 0
        for data in stream_bytes(source, tensor):
            yield tensor.name, begin, data
            begin += len(data)
        return
    columns, scales_of_row = tensor.shape[1], scale_shape(tensor.shape)[1]
    for block in cast_rows(source, tensor):
        yield tensor.name, block.start * columns, as_bytes(block.rows.contiguous())
        yield (tensor.name + SCALE_SUFFIX, block.start // BLOCK * scales_of_row * 4,
               as_bytes(block.scales.contiguous()))


def write_dcp(path: Path, file: OutputFile, source: TensorSource, advance: Callable[[int], None],
              places: dict[str, Place], prefix: str) -> Fingerprint:
    """Write a file of DCP items to `path` and return its fingerprint.

    Each tensor becomes items of its stacked parameter, so nothing is ever stacked in memory.
    """
    tensor_of: dict[ItemRegion, OutputTensor] = {}
    for tensor in file.tensors:
        place = places[tensor.name]
        for region in place.regions():
            tensor_of |= dict.fromkeys(split(ItemRegion(prefix + place.whole, region, tensor.dtype)), tensor)

    def numbers(item: ItemRegion) -> Iterator[memoryview]:
        tensor = tensor_of[item]
        return stream_bytes(source, tensor, *places[tensor.name].rows_of(item.region))

    return write_items(path, file.name, tensor_of, numbers, advance)


def divide(tensors: Sequence[T], largest: int) -> list[tuple[T, ...]]:
    """Divide `tensors`, or items, in order into groups of about the same size, of at most `largest` bytes or one.

    There are at least four groups once there is a gigabyte, so that several workers have something to do.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    count = max(-(-total // largest), min(4, total // (1 << 28)), 1)
    groups, size = [[]], 0
    for tensor in tensors:
        if groups[-1] and (size + tensor.nbytes > largest or size >= total / count):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return [tuple(group) for group in groups]
