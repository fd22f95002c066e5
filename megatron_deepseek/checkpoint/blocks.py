"""Rows of tensors on their way from a source to a target: read ahead in a thread, cast, checked."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch

from megatron_deepseek.checkpoint import block_fp8
from megatron_deepseek.checkpoint.safetensors_file import as_bytes
from megatron_deepseek.checkpoint.source import Source

FP8 = torch.float8_e4m3fn
BLOCK_BYTES = 1 << 25  # of a block's numbers in float32; three blocks or so are held at a time


@dataclass(frozen=True)
class Output:
    """A tensor to write: its Hugging Face name, the source's tensor that it is made from, and its type."""

    name: str
    original: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """In the target, scales included."""
        scales = 4 * prod(block_fp8.scale_shape(self.shape)) if self.dtype == FP8 else 0
        return prod(self.shape) * self.dtype.itemsize + scales


@dataclass(frozen=True, eq=False)
class Block:
    """Rows start..stop of an output; `scales` with float8 numbers."""

    output: Output
    start: int
    stop: int
    rows: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + (self.scales.nbytes if self.scales is not None else 0)


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows of at most BLOCK_BYTES, or 128 rows, so that no block of 128 x 128 is cut."""
    fitting = BLOCK_BYTES // (4 * prod(shape[1:])) if shape else 1
    step = max(fitting // block_fp8.BLOCK, 1) * block_fp8.BLOCK
    rows = shape[0] if shape else 1
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def cast_blocks(source: Source, outputs: Sequence[Output], advance: Callable[[int], None]) -> Iterator[Block]:
    """All rows of `outputs` in order. While the caller writes one block, the next is read.

    `advance` is told the bytes of the target that each block stands for. ValueError names the tensor.
    """
    requests = [(source, output, start, stop) for output in outputs for start, stop in row_ranges(output.shape)]
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        pending = pool.submit(_read, *requests[0])
        for number, (_, output, start, stop) in enumerate(requests):
            rows, scales = pending.result()
            if number + 1 < len(requests):
                pending = pool.submit(_read, *requests[number + 1])
            block = _cast(output, start, stop, rows, scales)
            yield block
            advance(block.nbytes)


def _read(source: Source, output: Output, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if output.dtype == FP8 and source.dtypes[output.original] == FP8:
        return source.read_fp8(output.original, start, stop)
    return source.read(output.original, start, stop), None


def _cast(output: Output, start: int, stop: int, rows: torch.Tensor, scales: torch.Tensor | None) -> Block:
    """To the output's type. What it cannot hold is an error, never an infinity."""
    if output.dtype != FP8:
        cast = rows.to(output.dtype)
        narrower = torch.finfo(output.dtype).max < torch.finfo(rows.dtype).max
        if narrower and (cast.isinf() & ~rows.isinf()).any():
            raise ValueError(f"{output.name} has a value of {rows.abs().max().item():g}, which is too large for "
                             f"{str(output.dtype).removeprefix('torch.')}")
        return Block(output, start, stop, cast)
    if scales is None:
        try:
            rows, scales = block_fp8.quantize(rows)
        except ValueError as error:
            raise ValueError(f"{output.name}: {error}") from error
    return Block(output, start, stop, rows, scales)


def check_copies(source: Source, advance: Callable[[int], None]) -> None:
    """ValueError unless each copy (a tied head, an MTP module's embedding) equals its original in every number."""
    for name, original in source.copies.items():
        shape = source.shapes[original]
        for start, stop in row_ranges(shape):
            if not torch.equal(source.read(name, start, stop), source.read(original, start, stop)):
                raise ValueError(f"{source.path}: {name} differs from {original} in rows {start}..{stop}; "
                                 f"here they are one parameter")
            advance(prod((stop - start, *shape[1:])) * source.dtypes[original].itemsize)


def checksum(tensor: torch.Tensor, before: int = 0) -> int:
    """CRC-32 of a tensor's bytes, continued from that of the rows before."""
    return zlib.crc32(as_bytes(tensor), before)
