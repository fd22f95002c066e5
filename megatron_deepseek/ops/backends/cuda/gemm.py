"""csrc/'s block-scaled products as the FP8 recipe calls them, with their references' arguments.

Each has forms that are not the default before they have run on a GPU: with `tma_store` bfloat16 results of a b with
128x128 scales leave by the copy engine (TMA); with `clusters` two blocks share what they read of a. Results are the
same.

An operator returns NotImplemented for what its kernel does not take (other dtypes, nothing to multiply): the registry
calls the reference then.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.backends.cuda.operands import table, tile_rows
from megatron_deepseek.ops.backends.kernels import TILE, operator, starts_aligned

_BF16 = torch.bfloat16


def _tall_tiles(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    return tile_rows(counts, 2 * TILE)


def _depths(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first tile, tiles) of the K of each group, which starts a new tile."""
    tiles = [-(-count // TILE) for count in counts]
    return [(sum(tiles[:i]), count) for i, count in enumerate(tiles)]


def _operand(q: torch.Tensor, columns: int) -> torch.Tensor:
    """Return q [.., N, K] as the copy engine (TMA) reads it: K last, rows from multiples of 16 bytes on."""
    fits = q.stride(-1) == 1 and q.stride(-2) % 16 == 0 and starts_aligned(q) and (
        q.ndim == 2 or q.stride(0) == q.shape[1] * q.stride(1))
    if fits:
        return q
    padded = q.new_zeros(*q.shape[:-1], -(-columns // 16) * 16, dtype=torch.uint8)
    padded[..., :columns] = q.view(torch.uint8) if q.stride(-1) == 1 else q.mT.view(torch.uint8).mT
    return padded.view(q.dtype)[..., :columns]


def _fits_gemm(a_q: torch.Tensor, out_dtype: torch.dtype) -> bool:
    return out_dtype in (_BF16, torch.float32) and a_q.shape[1] > 0 and a_q.shape[0] > 0


def scaled_mm(a_q, a_s, b_q, b_s, out_dtype=_BF16, *, tma_store: bool = False, clusters: bool = False):
    if not _fits_gemm(a_q, out_dtype):
        return NotImplemented
    operands = _operand(a_q, a_q.shape[1]), a_s.contiguous(), _operand(b_q, b_q.shape[1]), b_s.contiguous()
    return operator("scaled_mm")(*operands, out_dtype == torch.float32, tma_store, clusters)


def worth_tall_tiles(counts: Sequence[int]) -> bool:
    """Return whether tiles of 256 rows, which read b half as often, suit groups of these rows.

    The half of a tall tile that a group leaves empty costs nothing, but such tiles use two thirds of the ring of
    stages. So no more than half of them may have an empty half.
    """
    short, tall = (sum(-(-count // height) for count in counts) for height in (TILE, 2 * TILE))
    return 2 * short >= 3 * tall


def grouped_scaled_mm(a_q, a_s, b_q, b_s, counts, out_dtype=_BF16, *, tma_store: bool = False,
                      clusters: bool = False):
    if not _fits_gemm(a_q, out_dtype):
        return NotImplemented
    operands = _operand(a_q, a_q.shape[1]), a_s.contiguous(), _operand(b_q, b_q.shape[2]), b_s.contiguous()
    tall = worth_tall_tiles(counts)
    tiles = table(_tall_tiles if tall else tile_rows, counts, a_q)
    return operator("grouped_scaled_mm")(*operands, tiles, tall, out_dtype == torch.float32, tma_store, clusters)


def _padded_columns(q: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return codes of 128x1 tiles with every group padded to whole tiles; the reference's are not (widths that are no
    multiple of 8 are quantised there).
    """
    if q.shape[1] == sum(-(-count // TILE) for count in counts) * TILE:
        return q
    parts = q.contiguous().view(torch.uint8).split(list(counts), 1)
    return torch.cat([F.pad(part, (0, -part.shape[1] % TILE)) for part in parts], 1).view(q.dtype)


def grouped_scaled_mm_wgrad(a_q, a_s, b_q, b_s, counts, out_dtype=_BF16, *, clusters: bool = False):
    """Use clusters for up to four groups, as DeepGEMM does."""
    if not _fits_gemm(a_q, out_dtype):
        return NotImplemented
    a_q, b_q = (_padded_columns(q, counts) for q in (a_q, b_q))
    groups = table(_depths, counts, a_q)
    return operator("grouped_scaled_mm_wgrad")(a_q, a_s.contiguous(), b_q, b_s.contiguous(), groups,
                                               out_dtype == torch.float32, clusters and len(counts) <= 4)


scaled_mm_tma_store = functools.partial(scaled_mm, tma_store=True)
scaled_mm_clusters = functools.partial(scaled_mm, clusters=True)
scaled_mm_clusters_tma_store = functools.partial(scaled_mm, clusters=True, tma_store=True)
grouped_scaled_mm_tma_store = functools.partial(grouped_scaled_mm, tma_store=True)
grouped_scaled_mm_clusters = functools.partial(grouped_scaled_mm, clusters=True)
grouped_scaled_mm_clusters_tma_store = functools.partial(grouped_scaled_mm, clusters=True, tma_store=True)
grouped_scaled_mm_wgrad_clusters = functools.partial(grouped_scaled_mm_wgrad, clusters=True)
