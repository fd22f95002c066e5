"""What the kernels of csrc/ demand of their arguments: aligned rows, and tables on the device of groups' tiles."""

import functools
from collections.abc import Callable, Sequence

import torch

from megatron_deepseek.device import is_capturing, stream_number
from megatron_deepseek.ops.backends.kernels import TILE, rows_are_aligned, starts_aligned


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x contiguous, from an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if starts_aligned(x) else x.clone()


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x with contiguous rows that start at multiples of 16 bytes."""
    return x if rows_are_aligned(x) else dense(x)


def tile_rows(counts: Sequence[int], height: int = TILE) -> list[tuple[int, int, int]]:
    """Return (group, first row, rows) of every tile of `height` rows; each group starts a new tile."""
    tiles, first = [], 0
    for group, count in enumerate(counts):
        tiles += [(group, first + i, min(height, count - i)) for i in range(0, count, height)]
        first += count
    return tiles


def _copied(rows_of: Callable, counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    rows = rows_of(counts)
    width = len(rows[0]) if rows else 0
    return torch.tensor(rows, dtype=torch.int32).view(len(rows), width).to(device, non_blocking=True)


# An MoE layer asks about ten times for the tables of one micro-batch's counts. A table belongs to the stream that it
# was copied on: no other one waits for the copy, or may read it after it was dropped.
@functools.lru_cache(maxsize=512)
def _kept(rows_of: Callable, counts: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    if is_capturing(device):
        raise RuntimeError(f"a graph is captured of a step with {list(counts)} rows in its groups, whose table is not "
                           "on the device: run the step once before, on the stream of the capture")
    return _copied(rows_of, counts, device)


@functools.cache
def _captured(rows_of: Callable, counts: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    """Return a table that is kept and is never dropped: a graph reads it at each replay, without owning it."""
    return _kept(rows_of, counts, device, stream)


def table(rows_of: Callable[[tuple[int, ...]], list[tuple[int, ...]]], counts: Sequence[int], like: torch.Tensor
          ) -> torch.Tensor:
    """Return rows_of(counts) as int32 on the device of `like`, copied there once as long as it is kept.

    So a step with the counts of an earlier one copies nothing from the host, as the capture of a CUDA graph demands.
    What is made for tensors without data (FakeTensor, torch.compile) is not kept.
    """
    if torch.compiler.is_compiling() or type(like) is not torch.Tensor:
        return _copied(rows_of, tuple(counts), like.device)
    keep = _captured if is_capturing(like.device) else _kept
    return keep(rows_of, tuple(counts), like.device, stream_number(like.device))
