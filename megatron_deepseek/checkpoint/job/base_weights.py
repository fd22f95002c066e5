"""Reads frozen weights that are kept as NF4 or FP8: some rows at a time, so that memory holds little but the result.

Each rank reads the rows that its shards of codes and scales need, whole rows even where ranks divide columns: scales of
NF4 that are quantised belong to a row. What is stored in FP8 stays as it is under --quantization-bit 8, and all else is
quantised as a conversion would.

Shapes: N rows of one matrix, K columns. A stack of experts has one or two matrices for each, gate's rows before up's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.job.base_hash import hash_of
from megatron_deepseek.model.base_weights import HeldWeight
from megatron_deepseek.ops.frozen_weight import Bytes, Fp8Form
from megatron_deepseek.parallel.shards import is_first_copy, shard_regions

BLOCK = 128  # rows that are read begin at a multiple of it: where blocks of FP8 do
NUMBERS_AT_ONCE = 1 << 23


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows start..stop of matrix `matrix` of expert `expert` in a shard: `bytes` is the part of it that holds them.

    Of scales a row is one of blocks.
    """

    expert: int
    matrix: int
    start: int
    stop: int
    bytes: torch.Tensor

    def take(self, first: int, rows: torch.Tensor) -> None:
        """Copy what `rows`, which begin at row `first` of the matrix, have in common with these."""
        start, stop = max(first, self.start), min(first + len(rows), self.stop)
        if start < stop:
            self.bytes[start - self.start:stop - self.start].copy_(rows[start - first:stop - first])

    def of(self, first: int, rows: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return what these have in common with `rows`, and where it begins."""
        start, stop = max(first, self.start), max(first, self.start, min(first + len(rows), self.stop))
        return start, rows[start - first:stop - first]


@torch.no_grad()
def fill_held(stages: Sequence[nn.Module], source: TensorSource, device: torch.device) -> torch.Tensor:
    """Read and quantise every weight of this rank that is kept as bytes; return this rank's part of their hash.

    The hash (base_hash.py) is of the numbers as they are stored, whatever they are kept as. Raise ValueError for a
    number that is not finite.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for held in (held for stage in stages for held in stage.held):
        matrices, scale_rows = max(1, len(held.row.stacked)), held.shape.rows_of_scale
        codes = list(_rows_of(held.codes, matrices))
        scales = list(_rows_of(held.scales, matrices))
        counted = is_first_copy(held.codes)
        for expert, matrix in dict.fromkeys((each.expert, each.matrix) for each in (*codes, *scales)):
            own, own_scales = ([each for each in every if (each.expert, each.matrix) == (expert, matrix)]
                               for every in (codes, scales))
            tensor = tuple(held.row.hf_tensors(expert))[matrix]
            wanted = [(each.start, each.stop) for each in own] + [
                (each.start * scale_rows, each.stop * scale_rows) for each in own_scales]
            for first, stop in _chunks(wanted, *tensor.shape):
                numbers, (new, new_scales) = _read(held, source, tensor.name, first, stop, device)
                for each in own:
                    each.take(first, new)
                    if counted:
                        total += _hash(held, tensor.offset, *each.of(first, numbers))
                for each in own_scales:
                    each.take(first // scale_rows, new_scales)
    return total


def _rows_of(parameter: DTensor, matrices: int) -> Iterator[_Rows]:
    """Yield what a shard holds, by expert and matrix."""
    height = parameter.shape[-2] // matrices
    for region in shard_regions(parameter):
        if not region.local.numel():
            continue
        *experts, row, _ = region.offset
        stack = region.local if experts else region.local.unsqueeze(0)
        for number, part in enumerate(stack):
            for matrix in range(row // height, -(-(row + len(part)) // height)):
                start, stop = max(row, matrix * height), min(row + len(part), (matrix + 1) * height)
                yield _Rows(experts[0] + number if experts else 0, matrix, start - matrix * height,
                            stop - matrix * height, part[start - row:stop - row])


def _chunks(wanted: Iterable[tuple[int, int]], rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield the rows to read at once: all that are wanted, from multiples of BLOCK on."""
    start, stop = min(each[0] for each in wanted), min(rows, max(each[1] for each in wanted))
    step = max(1, NUMBERS_AT_ONCE // columns // BLOCK) * BLOCK
    for first in range(start // BLOCK * BLOCK, stop, step):
        yield first, min(rows, first + step, -(-stop // BLOCK) * BLOCK)


def _read(held: HeldWeight, source: TensorSource, name: str, first: int, stop: int, device: torch.device
          ) -> tuple[torch.Tensor, Bytes]:
    """Return rows of a stored tensor in float32, and their bytes."""
    form = held.form
    try:
        if isinstance(form, Fp8Form) and source.dtypes[name] == torch.float8_e4m3fn:
            codes, scales = (part.to(device) for part in source.read_fp8(name, first, stop))
            return Fp8Form(codes.shape[1], by_row=False).dense(
                codes.view(torch.uint8), scales.view(torch.uint8), torch.float32), form.pack_blocks(
                codes, scales, held.columns)
        numbers = source.read(name, first, stop).to(device).float()
        return numbers, form.pack(numbers, held.columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _hash(held: HeldWeight, offset: Sequence[int], row: int, numbers: torch.Tensor) -> torch.Tensor:
    """Return the hash of the columns of this rank of rows that begin at `row` of a tensor at `offset`."""
    own = numbers[:, held.columns].contiguous()
    *experts, first, _ = offset
    local = own.unsqueeze(0) if experts else own
    return hash_of(held.row.name, torch.Size(held.row.shape), local, (*experts, first + row, held.columns.start))
