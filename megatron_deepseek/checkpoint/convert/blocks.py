"""Blocks of rows on their way from a source to an output file: read, cast to the output's dtype, checked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.names import layer_of
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.safetensors_file import as_bytes

FP8 = torch.float8_e4m3fn
BLOCK_BYTES = 1 << 20  # a block's size in float32, small enough to stay in a core's cache until it is written


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write, under its Hugging Face name: made from the source's tensor `original`, stored as `dtype`.

    `scale_format`: in which format (block_fp8.SCALE_FORMATS) float8 weights get new scales; None where they have the
    source's, or are not float8.
    """

    name: str
    original: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale_format: str | None = None

    @property
    def layer(self) -> int | None:
        """Return the layer that it belongs to, None for embedding, last norm and head."""
        return layer_of(self.name)

    @property
    def nbytes(self) -> int:
        """Return how many bytes are written, scales included."""
        scales = 4 * prod(block_fp8.scale_shape(self.shape)) if self.dtype == FP8 else 0
        return prod(self.shape) * self.dtype.itemsize + scales


@dataclass(frozen=True, eq=False)
class Block:
    """Rows start..stop of an OutputTensor, with the `scales` of their blocks of 128 x 128 if they are float8."""

    tensor: OutputTensor
    start: int
    stop: int
    rows: torch.Tensor
    scales: torch.Tensor | None = None


def row_ranges(shape: tuple[int, ...], start: int, stop: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the ranges that divide rows start..stop into steps of about BLOCK_BYTES and a `multiple` of rows."""
    fitting = BLOCK_BYTES // (4 * prod(shape[1:])) if shape else 1
    step = max(fitting // multiple, 1) * multiple
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def cast_rows(source: TensorSource, tensor: OutputTensor, start: int = 0, stop: int | None = None) -> Iterator[Block]:
    """Yield rows start..stop of `tensor` (by default all) in order; float8 rows in multiples of 128.

    Raise ValueError, naming the tensor, for a value that its dtype cannot hold.
    """
    stop = (tensor.shape[0] if tensor.shape else 1) if stop is None else stop
    multiple = block_fp8.BLOCK if FP8 in (tensor.dtype, source.dtypes[tensor.original]) else 1
    for first, last in row_ranges(tensor.shape, start, stop, multiple):
        yield _cast(tensor, first, last, *_read(source, tensor, first, last))


def stream_bytes(source: TensorSource, tensor: OutputTensor, start: int = 0, stop: int | None = None
                 ) -> Iterator[memoryview]:
    """Yield the bytes of rows start..stop of `tensor`, which is not float8; each block may overwrite the one before.

    They are the source's stored bytes as they are, unless the dtype changes.
    """
    stop = (tensor.shape[0] if tensor.shape else 1) if stop is None else stop
    if tensor.dtype == source.dtypes[tensor.original]:
        yield from source.stream(tensor.original, start, stop)
    else:
        for block in cast_rows(source, tensor, start, stop):
            yield as_bytes(block.rows.contiguous())


def _read(source: TensorSource, tensor: OutputTensor, start: int, stop: int
          ) -> tuple[torch.Tensor, torch.Tensor | None]:
    if tensor.dtype == FP8 and tensor.scale_format is None:
        return source.read_fp8(tensor.original, start, stop)
    return source.read(tensor.original, start, stop), None


def _cast(tensor: OutputTensor, start: int, stop: int, rows: torch.Tensor, scales: torch.Tensor | None) -> Block:
    if tensor.dtype != FP8:
        return Block(tensor, start, stop, cast(tensor.name, rows, tensor.dtype))
    if scales is None:
        try:
            rows, scales = block_fp8.quantize(rows, tensor.scale_format)
        except ValueError as error:
            raise ValueError(f"{tensor.name}: {error}") from error
    return Block(tensor, start, stop, rows, scales)


def cast(name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast `rows` of the tensor `name`; raise ValueError for a value that would become infinite."""
    result = rows.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(rows.dtype).max
    if narrower and (result.isinf() & ~rows.isinf()).any():
        raise ValueError(f"{name} has a value of {rows.abs().max().item():g}, which is too large for "
                         f"{str(dtype).removeprefix('torch.')}")
    return result


def check_copies(source: TensorSource, advance: Callable[[int], None]) -> None:
    """Raise ValueError unless each copy (a tied head, an MTP module's embedding) equals its original exactly."""
    for name, original in source.copies.items():
        shape = source.shapes[original]
        for start, stop in row_ranges(shape, 0, shape[0], block_fp8.BLOCK):
            if not torch.equal(source.read(name, start, stop), source.read(original, start, stop)):
                raise ValueError(f"{source.path}: {name} differs from {original} in rows {start}..{stop}; "
                                 f"here they are one parameter")
            advance(prod((stop - start, *shape[1:])) * source.dtypes[original].itemsize)
