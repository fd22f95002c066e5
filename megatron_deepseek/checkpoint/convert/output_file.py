"""One file of a conversion's output, written from blocks of rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from megatron_deepseek.checkpoint.convert.block_fp8 import BLOCK, SCALE_SUFFIX, scale_shape
from megatron_deepseek.checkpoint.convert.blocks import Output, cast_rows, row_bytes
from megatron_deepseek.checkpoint.convert.names import Place
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.dcp.item_file import FileWriter, ItemRegion, split, write_items
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.regions import Region
from megatron_deepseek.checkpoint.safetensors_file import as_bytes, lay_out


@dataclass(frozen=True)
class OutputFile:
    """A file to write and the tensors in it, in the order of their writing."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def write_safetensors(path: Path, shard: OutputFile, source: TensorSource, advance: Callable[[int], None]
                      ) -> Fingerprint:
    """Blocks go straight to their places, float8 weights and their scales apart."""
    tensors: dict = {}
    for output in shard.outputs:
        tensors[output.name] = output.dtype, output.shape
        if output.dtype == torch.float8_e4m3fn:
            tensors[output.name + SCALE_SUFFIX] = torch.float32, scale_shape(output.shape)
    header, placed = lay_out(path, tensors)
    places, digests = {tensor.name: tensor for tensor in placed}, {name: xxhash.xxh3_128() for name in tensors}
    with FileWriter(path) as file:
        file.write(header)
        for output in sorted(shard.outputs, key=lambda output: places[output.name].offset):
            file.tensor = output.name
            for name, begin, data in _pieces(source, output):
                file.write_at(places[name].offset + begin, data)
                digests[name].update(data)
                advance(len(data))
    regions = [(0, len(header), file.checksum.result().digest)]
    regions += [(tensor.offset, tensor.nbytes, digests[tensor.name].hexdigest()) for tensor in placed]
    return Fingerprint(placed[-1].offset + placed[-1].nbytes, regions)


def _pieces(source: TensorSource, output: Output) -> Iterator[tuple[str, int, memoryview]]:
    """Tensor, byte in it, and bytes: of float8 the rows and the scales of their blocks in turn."""
    if output.dtype != torch.float8_e4m3fn:
        begin = 0
        for data in row_bytes(source, output):
            yield output.name, begin, data
            begin += len(data)
        return
    columns, blocks = output.shape[1], scale_shape(output.shape)[1]
    for block in cast_rows(source, output):
        yield output.name, block.start * columns, as_bytes(block.rows.contiguous())
        yield (output.name + SCALE_SUFFIX, block.start // BLOCK * blocks * 4,
               as_bytes(block.scales.contiguous()))


def write_dcp(path: Path, shard: OutputFile, source: TensorSource, advance: Callable[[int], None],
              places: dict[str, Place], prefix: str) -> Fingerprint:
    """Each tensor becomes items of its stacked parameter, so that nothing is ever stacked in memory."""
    origins: dict[ItemRegion, Output] = {}
    for output in shard.outputs:
        place = places[output.name]
        whole = ItemRegion(prefix + place.whole, Region(place.offset, place.extent), output.dtype)
        origins |= dict.fromkeys(split(whole), output)

    def numbers(part: ItemRegion) -> Iterator[memoryview]:
        output = origins[part]
        return row_bytes(source, output, *places[output.name].rows_of(part.region))

    return write_items(path, shard.name, origins, numbers, advance)


def divide(outputs: Sequence[Output], largest: int) -> list[tuple[Output, ...]]:
    """`outputs` in order, in groups of at most `largest` bytes or one tensor, of about the same size.

    At least four groups once there is a gigabyte, so that several workers have something to do.
    """
    total = sum(output.nbytes for output in outputs)
    count = max(-(-total // largest), min(4, total // (1 << 28)), 1)
    groups, size = [[]], 0
    for output in outputs:
        if groups[-1] and (size + output.nbytes > largest or size >= total / count):
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    return [tuple(group) for group in groups]
