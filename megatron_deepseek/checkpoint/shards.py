"""One file of a conversion's output: written from blocks, and checked again by its checksums."""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.blocks import Output, cast_blocks, checksum
from megatron_deepseek.checkpoint.block_fp8 import BLOCK, SCALE_SUFFIX, scale_shape
from megatron_deepseek.checkpoint.dcp_files import Item
from megatron_deepseek.checkpoint.integrity import RunningChecksum
from megatron_deepseek.checkpoint.names import Place
from megatron_deepseek.checkpoint.safetensors_file import as_bytes, lay_out
from megatron_deepseek.checkpoint.source import Source

_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Shard:
    """A file to write and the tensors in it, in the order of their writing."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Record:
    """What a finished file is known by: size, CRC-32 of its regions [offset, length, crc], the DCP items in it.

    `digest`: of the whole file, for checksums.json, where it was written from its beginning to its end.
    """

    size: int
    regions: list[list[int]]
    items: list[Item] = field(default_factory=list)
    digest: str | None = None

    def to_json(self) -> dict:
        items = [asdict(item) | {"dtype": str(item.dtype).removeprefix("torch.")} for item in self.items]
        return {"size": self.size, "regions": self.regions, "items": items, "digest": self.digest}

    @classmethod
    def from_json(cls, fields: dict) -> "Record":
        items = [Item(**(item | {"dtype": getattr(torch, item["dtype"]), "place": tuple(item["place"]),
                                 "shape": tuple(item["shape"])})) for item in fields["items"]]
        return cls(fields["size"], fields["regions"], items, fields.get("digest"))


class Writer:
    """A file written at increasing or given offsets; an error names it and the tensor that was being written."""

    def __init__(self, path: Path):
        self.path, self.tensor, self.position, self.crc = path, "the header", 0, 0
        self.checksum = RunningChecksum()
        self.failure: ValueError | None = None
        self.file = open(path, "wb", buffering=0)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data) -> int:
        """At the current position, counted in `crc` and `checksum`: what torch.save writes to."""
        data = memoryview(data).cast("B")
        self.write_at(self.position, data)
        self.crc = zlib.crc32(data, self.crc)
        self.checksum.update(data)
        self.position += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered; torch.save asks."""

    def write_at(self, offset: int, data) -> None:
        data = memoryview(data).cast("B")
        try:
            while len(data):
                count = os.pwrite(self.file.fileno(), data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            self.failure = ValueError(f"{self.path}: {self.tensor} cannot be written: {error.strerror}")
            raise self.failure from error

    def save(self, tensor: torch.Tensor) -> None:
        """torch.save at the current position; its own error after a failed write hides what failed."""
        try:
            torch.save(tensor, self)
        except RuntimeError:
            if self.failure is None:
                raise
            raise self.failure from None


def write_safetensors(path: Path, shard: Shard, source: Source, advance: Callable[[int], None]) -> Record:
    """Blocks go straight to their places, float8 weights and their scales apart."""
    tensors: dict = {}
    for output in shard.outputs:
        tensors[output.name] = output.dtype, output.shape
        if output.dtype == torch.float8_e4m3fn:
            tensors[output.name + SCALE_SUFFIX] = torch.float32, scale_shape(output.shape)
    header, placed = lay_out(path, tensors)
    places, crcs = {tensor.name: tensor for tensor in placed}, dict.fromkeys(tensors, 0)
    with Writer(path) as file:
        file.write_at(0, header)
        for block in cast_blocks(source, shard.outputs, advance):
            name = file.tensor = block.output.name
            parts = [(name, block.start, block.rows)]
            if block.scales is not None:
                parts.append((name + SCALE_SUFFIX, block.start // BLOCK, block.scales))
            for part, row, numbers in parts:
                numbers = numbers.contiguous()
                file.write_at(places[part].offset + row * places[part].row_bytes, as_bytes(numbers))
                crcs[part] = checksum(numbers, crcs[part])
    regions = [[0, len(header), zlib.crc32(header)]]
    regions += [[tensor.offset, tensor.nbytes, crcs[tensor.name]] for tensor in placed]
    return Record(placed[-1].offset + placed[-1].nbytes, regions)


def write_dcp(path: Path, shard: Shard, source: Source, advance: Callable[[int], None],
              places: dict[str, Place], prefix: str) -> Record:
    """Each block becomes an item of its stacked parameter, so that nothing is ever stacked in memory."""
    items = []
    with Writer(path) as file:
        for block in cast_blocks(source, shard.outputs, advance):
            place, file.tensor, begin = places[block.output.name], block.output.name, file.position
            offset, size = place.rows(block.start, block.stop)
            file.save(block.rows.contiguous().view(size))
            items.append(Item(prefix + place.whole, offset, size, block.output.dtype, shard.name, begin,
                              file.position - begin))
    return Record(file.position, [[0, file.position, file.crc]], items, file.checksum.result().digest)


def verify(path: Path, record: Record) -> bool:
    """Whether the file still is what `record` says, every byte of it."""
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != record.size:
                return False
            return all(_crc(file, offset, length) == crc for offset, length, crc in record.regions)
    except OSError:
        return False


def _crc(file, offset: int, length: int) -> int:
    crc, end = 0, offset + length
    while offset < end:
        data = os.pread(file.fileno(), min(_READ_BYTES, end - offset), offset)
        if not data:
            return -1
        crc, offset = zlib.crc32(data, crc), offset + len(data)
    return crc


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
