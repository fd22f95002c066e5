"""Rows of tensors on their way from a source to a target: read, cast, checked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.safetensors_file import as_bytes

FP8 = torch.float8_e4m3fn
BLOCK_BYTES = 1 << 20  # of a block's numbers in float32: it stays in a core's cache until it is written


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


def row_ranges(shape: tuple[int, ...], start: int, stop: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Rows start..stop in steps of about BLOCK_BYTES and of a `multiple` of rows."""
    fitting = BLOCK_BYTES // (4 * prod(shape[1:])) if shape else 1
    step = max(fitting // multiple, 1) * multiple
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def cast_rows(source: TensorSource, output: Output, start: int = 0, stop: int | None = None) -> Iterator[Block]:
    """Rows start..stop of `output` (all of them) in order; of float8 no block of 128 x 128 is cut.

    ValueError names the tensor.
    """
    stop = (output.shape[0] if output.shape else 1) if stop is None else stop
    multiple = block_fp8.BLOCK if FP8 in (output.dtype, source.dtypes[output.original]) else 1
    for first, last in row_ranges(output.shape, start, stop, multiple):
        yield _cast(output, first, last, *_read(source, output, first, last))


def row_bytes(source: TensorSource, output: Output, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
    """The bytes of rows start..stop of `output`, which is not float8, in order; each block is used up at once.

    Those of the source as they are, unless the type changes.
    """
    stop = (output.shape[0] if output.shape else 1) if stop is None else stop
    if output.dtype == source.dtypes[output.original]:
        yield from source.stream(output.original, start, stop)
    else:
        for block in cast_rows(source, output, start, stop):
            yield as_bytes(block.rows.contiguous())


def _read(source: TensorSource, output: Output, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if output.dtype == FP8 and source.dtypes[output.original] == FP8:
        return source.read_fp8(output.original, start, stop)
    return source.read(output.original, start, stop), None


def _cast(output: Output, start: int, stop: int, rows: torch.Tensor, scales: torch.Tensor | None) -> Block:
    if output.dtype != FP8:
        return Block(output, start, stop, cast(output.name, rows, output.dtype))
    if scales is None:
        try:
            rows, scales = block_fp8.quantize(rows)
        except ValueError as error:
            raise ValueError(f"{output.name}: {error}") from error
    return Block(output, start, stop, rows, scales)


def cast(name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`rows` of the tensor `name` in another type. What it cannot hold is an error, never an infinity."""
    result = rows.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(rows.dtype).max
    if narrower and (result.isinf() & ~rows.isinf()).any():
        raise ValueError(f"{name} has a value of {rows.abs().max().item():g}, which is too large for "
                         f"{str(dtype).removeprefix('torch.')}")
    return result


def check_copies(source: TensorSource, advance: Callable[[int], None]) -> None:
    """ValueError unless each copy (a tied head, an MTP module's embedding) equals its original in every number."""
    for name, original in source.copies.items():
        shape = source.shapes[original]
        for start, stop in row_ranges(shape, 0, shape[0], block_fp8.BLOCK):
            if not torch.equal(source.read(name, start, stop), source.read(original, start, stop)):
                raise ValueError(f"{source.path}: {name} differs from {original} in rows {start}..{stop}; "
                                 f"here they are one parameter")
            advance(prod((stop - start, *shape[1:])) * source.dtypes[original].itemsize)
