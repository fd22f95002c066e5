"""GEMMs of block-scaled FP8 operands, in the order of arithmetic that the recipe asks of the tensor cores.

    y[m, n] = sum over blocks j of 128 of K:  (sum over k in j of a_q[m, k] * b_q[n, k]) * (a_s[m, j] * b_s[n, j])

Products of two E4M3 numbers are exact in float32. The inner sum may be in any order, in at least the tensor core's
precision; the outer sum, over j in order, is float32 (Hopper's accumulators keep about 14 bits: 2 % error at K = 4096
without this promotion). So two backends agree to rounding, not bit for bit, though their inputs are bit-identical
(encoding.py). With `out_dtype` float64 everything is float64: for tests that compare layouts exactly.

Both operands have K last, as tensor cores read them. For dgrad pass a weight's transpose, for wgrad 128x1 tiles. A NaN
scale makes every result NaN that it enters.

Shapes: M rows, N columns of the result, K summed over, k = ceil(K / 128), R rows of all E groups, T their tiles.
"""

from collections.abc import Callable, Sequence

import torch

from megatron_deepseek.ops.backends.registry import with_backends
from megatron_deepseek.ops.fp8.encoding import TILE, decode, num_tiles


@with_backends("scaled_mm")
def scaled_mm(a_q: torch.Tensor, a_s: torch.Tensor, b_q: torch.Tensor, b_s: torch.Tensor,
              out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return [M, N] = a b^T of block-scaled a and b.

    a is [M, K] with scales [M, k]; b is [N, K] with scales [N, k] (1x128) or [ceil(N / 128), k] (128x128).

    K = 0 gives zeros.
    """
    rows, columns = a_q.shape[0], b_q.shape[0]
    assert a_s.shape == (rows, num_tiles(a_q.shape[1])) and a_q.shape[1] == b_q.shape[1], (a_q.shape, b_q.shape)
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    a, b = decode(a_q).to(wide), decode(b_q).to(wide)
    a_s, b_s = a_s.to(wide), _for_each_row(b_s, columns).to(wide)
    result = torch.zeros(rows, columns, dtype=wide, device=a_q.device)
    for part_a, part_b, scale_a, scale_b in zip(a.split(TILE, 1), b.split(TILE, 1), a_s.t(), b_s.t()):
        result.addcmul_(part_a @ part_b.t(), torch.outer(scale_a, scale_b))
    return result.to(out_dtype)


def _for_each_row(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Return scales [rows, k] of 1x128 tiles, given those or [ceil(rows / 128), k] of 128x128 blocks."""
    if scale.shape[0] == rows:
        return scale
    assert scale.shape[0] == num_tiles(rows), (scale.shape, rows)
    return scale.repeat_interleave(TILE, 0)[:rows]


@with_backends("grouped_scaled_mm")
def grouped_scaled_mm(a_q: torch.Tensor, a_s: torch.Tensor, b_q: torch.Tensor, b_s: torch.Tensor,
                      counts: Sequence[int], out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return the M-grouped GEMM [R, N], for forward and dgrad: each group of counts[i] rows of a times b[i].

    a is [R, K] with scales [R, k]; b is [E, N, K] with scales [E, ceil(N / 128), k]. The counts sum to R; any may be 0.
    """
    return rows_of_groups(scaled_mm.reference, a_q, a_s, b_q, b_s, counts, out_dtype)


def rows_of_groups(multiply: Callable[..., torch.Tensor], a_q, a_s, b_q, b_s, counts, out_dtype) -> torch.Tensor:
    """Return the M-grouped GEMM, each group's by a `multiply` like `scaled_mm`."""
    result = torch.empty(a_q.shape[0], b_q.shape[1], dtype=out_dtype, device=a_q.device)
    parts = zip(a_q.split(list(counts)), a_s.split(list(counts)), b_q, b_s, result.split(list(counts)), strict=True)
    for part_q, part_s, weight_q, weight_s, out in parts:
        out.copy_(multiply(part_q, part_s, weight_q, weight_s, out_dtype))
    return result


@with_backends("grouped_scaled_mm_wgrad")
def grouped_scaled_mm_wgrad(a_q: torch.Tensor, a_s: torch.Tensor, b_q: torch.Tensor, b_s: torch.Tensor,
                            counts: Sequence[int], out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return the K-grouped GEMM [E, M, N]: a [M, R] times b [N, R], summed over each group of columns.

    Scales are [M, T] and [N, T], as `quantize_128x1` makes them with the same counts. A group of no rows has zeros.
    """
    return depths_of_groups(scaled_mm.reference, a_q, a_s, b_q, b_s, counts, out_dtype)


def depths_of_groups(multiply: Callable[..., torch.Tensor], a_q, a_s, b_q, b_s, counts, out_dtype) -> torch.Tensor:
    """Return the K-grouped GEMM, each group's by a `multiply` like `scaled_mm`."""
    tiles = [num_tiles(count) for count in counts]
    result = torch.empty(len(counts), a_q.shape[0], b_q.shape[0], dtype=out_dtype, device=a_q.device)
    parts = zip(*(x.split(sizes, 1) for x, sizes in ((a_q, list(counts)), (a_s, tiles), (b_q, list(counts)),
                                                     (b_s, tiles))), result, strict=True)
    for part_a, scale_a, part_b, scale_b, out in parts:
        out.copy_(multiply(part_a, scale_a, part_b, scale_b, out_dtype))
    return result
