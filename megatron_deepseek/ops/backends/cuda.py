"""The operators of csrc/ for CUDA tensors, with the references' arguments; NotImplemented to leave it to the reference.

Kernels do not take dtypes other than their own, or widths that are no multiples of 16 bytes. Their results may have
another memory layout than the reference's (codes of 128x1 tiles are padded to whole tiles), which only other kernels
see.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from megatron_deepseek.device import stream_number
from megatron_deepseek.ops.backends import registry
from megatron_deepseek.ops.backends.kernels import TILE, operator, rows_are_aligned, starts_aligned
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled, plain
from megatron_deepseek.ops.swiglu import swiglu_backward

_BF16 = torch.bfloat16


# RoPE (rope.py) -------------------------------------------------------------------------------------------------------

def rope_queries(x: torch.Tensor, table_2SD: torch.Tensor, nope: int):
    if x.dtype != _BF16 or nope % 8 or x.shape[-1] % 8:
        return NotImplemented
    return operator("rope_tail")(_aligned(x), table_2SD.float().contiguous(), nope, False)


def assemble_keys(kv: torch.Tensor, k_rope: torch.Tensor, table_2SD: torch.Tensor | None, nope: int):
    if kv.dtype != _BF16 or nope % 8 or kv.shape[-1] % 8 or k_rope.shape[-1] % 8:
        return NotImplemented
    table = None if table_2SD is None else table_2SD.float().contiguous()
    return operator("keys_values")(_dense(kv), _dense(k_rope), table, nope)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return x contiguous, from an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if starts_aligned(x) else x.clone()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x with contiguous rows that start at multiples of 16 bytes."""
    return x if rows_are_aligned(x) else _dense(x)


# Routing (permute.py) -------------------------------------------------------------------------------------------------

def sort_by_expert(experts_TK: torch.Tensor, num_experts: int):
    if experts_TK.dtype != torch.int64 or num_experts > 1024 or not experts_TK.numel():
        return NotImplemented
    order_R, inverse_R, counts_E, _ = operator("route")(experts_TK.contiguous(), num_experts, 1)
    return order_R, inverse_R, counts_E.long()


def _rows_fit(x: torch.Tensor) -> bool:
    return not isinstance(x, BlockScaled) and x.ndim == 2 and x.shape[1] * x.element_size() % 16 == 0


def _gather(x: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, copies: int):
    if not _rows_fit(x) or x.requires_grad and x.dtype != _BF16:
        return NotImplemented
    return operator("gather_rows")(_dense(x), order_R.int(), inverse_R.int().view(-1, copies))


def gather_rows(x_RW: torch.Tensor, index_Q: torch.Tensor):
    if not _rows_fit(x_RW) or not x_RW.is_contiguous():
        return NotImplemented
    unread = index_Q.new_empty(len(x_RW), 1, dtype=torch.int32)  # only the derivative would read it
    return operator("gather_rows")(x_RW, index_Q.int(), unread)


def permute(x_RH: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor):
    return _gather(x_RH, order_R, inverse_R, 1)


def copy_and_permute(x_TH: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor):
    return _gather(x_TH, order_R, inverse_R, order_R.shape[0] // x_TH.shape[0]) if len(x_TH) else NotImplemented


def weighted_sum(y_RH: torch.Tensor, weights_TK: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor):
    if not _rows_fit(y_RH) or y_RH.dtype != _BF16:
        return NotImplemented
    slots_TK = inverse_R.int().view(weights_TK.shape)
    return operator("combine_rows")(_dense(y_RH), order_R.int(), slots_TK, weights_TK.float().contiguous())


# Cross-entropy (cross_entropy.py) -------------------------------------------------------------------------------------

def cross_entropy_statistics(logits_Tv: torch.Tensor, labels_T: torch.Tensor, first_id: int):
    if logits_Tv.dtype != _BF16:
        return NotImplemented
    return operator("cross_entropy_statistics")(_dense(logits_Tv), labels_T.contiguous(), first_id)


def cross_entropy_gradient(logits_Tv, labels_T, first_id, max_T, sum_T, grad_T):
    """Overwrite contiguous logits with their gradient and return them."""
    if logits_Tv.dtype != _BF16:
        return NotImplemented
    logits_Tv = _dense(logits_Tv)
    operator("cross_entropy_gradient_")(logits_Tv, labels_T.contiguous(), first_id, max_T, sum_T,
                                        grad_T.float().contiguous())
    torch.autograd.graph.increment_version(logits_Tv)  # makes a second backward an error, not a wrong result
    return logits_Tv


# FP8 tiles (fp8/encoding.py, fp8/recipe.py) ---------------------------------------------------------------------------

def _takes(x: torch.Tensor) -> bool:
    return x.dtype in (_BF16, torch.float32) and x.shape[-1] % 8 == 0 and x.numel() > 0


def quantize_1x128(x: torch.Tensor, power_of_two: bool = False):
    if not _takes(x):
        return NotImplemented
    q, scale = operator("quantize_rows")(_aligned(x.flatten(0, -2)), power_of_two)
    return q.view(x.shape), scale.view(*x.shape[:-1], -1)


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
    return _copied(rows_of, counts, device)


def table(rows_of: Callable[[tuple[int, ...]], list[tuple[int, ...]]], counts: Sequence[int], like: torch.Tensor
          ) -> torch.Tensor:
    """Return rows_of(counts) as int32 on the device of `like`, copied there once as long as it is kept.

    So a step with the counts of an earlier one copies nothing from the host, as the capture of a CUDA graph demands.
    What is made for tensors without data (FakeTensor, torch.compile) is not kept.
    """
    if torch.compiler.is_compiling() or type(like) is not torch.Tensor:
        return _copied(rows_of, tuple(counts), like.device)
    return _kept(rows_of, tuple(counts), like.device, stream_number(like.device))


def _rows_in_tiles(counts: Sequence[int]) -> list[tuple[int, int]]:
    return [tile[1:] for tile in tile_rows(counts)]


def _tall_tiles(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    return tile_rows(counts, 2 * TILE)


def _depths(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first tile, tiles) of the K of each group, which starts a new tile."""
    tiles = [-(-count // TILE) for count in counts]
    return [(sum(tiles[:i]), count) for i, count in enumerate(tiles)]


def _row_tiles(counts: Sequence[int] | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if counts is None else table(_rows_in_tiles, counts, like)


def _columns(x: torch.Tensor, counts: Sequence[int] | None, quantized: tuple[torch.Tensor, torch.Tensor]):
    """Return codes of 128x1 tiles. With `counts` every tile is padded to 128 places with zero codes."""
    q, scale = quantized
    return (q[:, :x.shape[0]] if counts is None else q), scale


def _no_columns(counts: Sequence[int] | None) -> bool:
    """Return whether groups' 128x1 tiles are left to the reference: only csrc's wgrad reads padded ones."""
    return counts is not None and registry.choices()["grouped_scaled_mm_wgrad"].backend != "csrc"


def quantize_128x1(x: torch.Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None):
    if not _takes(x) or _no_columns(counts):
        return NotImplemented
    return _columns(x, counts, operator("quantize_columns")(_dense(x), _row_tiles(counts, x), power_of_two))


def retile_128x1(q: torch.Tensor, scale: torch.Tensor, power_of_two: bool = False,
                 counts: Sequence[int] | None = None):
    if q.shape[-1] % 8 or not q.numel() or _no_columns(counts):
        return NotImplemented
    return _columns(q, counts, operator("retile_columns")(
        _dense(q), scale.contiguous(), _row_tiles(counts, q), power_of_two))


def quantize_e5m6(x: torch.Tensor):
    if not _takes(x):
        return NotImplemented
    packed, scale = operator("quantize_e5m6")(_aligned(x.flatten(0, -2)))
    return packed.view(*x.shape[:-1], -1), scale.view(*x.shape[:-1], -1)


def dequantize_e5m6(packed: torch.Tensor, scale: torch.Tensor, size: int, dtype: torch.dtype = torch.float32):
    if dtype not in (_BF16, torch.float32) or size % 8 or not packed.numel():
        return NotImplemented
    rows = operator("dequantize_e5m6")(_dense(packed.flatten(0, -2)), scale.flatten(0, -2).contiguous(),
                                       dtype == torch.float32)
    return rows.view(*packed.shape[:-1], size)


def retile_e5m6(packed: torch.Tensor, scale: torch.Tensor, size: int, power_of_two: bool,
                counts: Sequence[int] | None = None):
    if size % 8 or not packed.numel() or _no_columns(counts):
        return NotImplemented
    return _columns(packed, counts, operator("retile_e5m6")(
        _dense(packed), scale.contiguous(), _row_tiles(counts, packed), power_of_two))


def quantize_128x128(x: torch.Tensor, power_of_two: bool = False):
    if not _takes(x) or x.ndim not in (2, 3):
        return NotImplemented
    return operator("quantize_blocks")(_dense(x), False, power_of_two)[:2]


def quantize_both_ways(weight: torch.Tensor):
    """Return views of the codes: rows of the transpose's are padded to whole tiles, which the view does not show."""
    if not _takes(weight) or weight.ndim not in (2, 3):
        return NotImplemented
    q, scale, q_t, scale_t = operator("quantize_blocks")(_dense(weight), True, False)
    return (q, scale), (q_t[..., :weight.shape[-2]], scale_t)


def quantize_rows_and_columns(x: torch.Tensor, power_of_two: bool = False, counts: Sequence[int] | None = None):
    if not _takes(x) or _no_columns(counts):
        return NotImplemented
    q, scale, *columns = operator("quantize_both")(_dense(x), _row_tiles(counts, x), power_of_two)
    return (q, scale), _columns(x, counts, columns)


def _gate_and_up(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor] | None:
    """Return both as matrices with equal distances between rows; None if the kernels don't take them."""
    if gate.dtype != _BF16 or gate.shape[-1] % 8 or not gate.numel():
        return None
    rows = [_aligned(x.flatten(0, -2)) for x in (gate, up)]
    return rows if rows[0].stride(0) == rows[1].stride(0) else [_dense(x) for x in rows]


def quantize_swiglu(gate: torch.Tensor, up: torch.Tensor, power_of_two: bool = False):
    rows = _gate_and_up(gate, up)
    if rows is None:
        return NotImplemented
    q, scale = operator("swiglu_quantize_rows")(*rows, power_of_two)
    return q.view(gate.shape), scale.view(*gate.shape[:-1], -1)


def quantize_swiglu_columns(gate: torch.Tensor, up: torch.Tensor, power_of_two: bool,
                            counts: Sequence[int] | None = None):
    """Take gate and up as numbers, or as the tiles (BlockScaled) that were kept of them for the backward."""
    if _no_columns(counts):
        return NotImplemented
    if (kept := _kept_tiles(gate, up)) is not None:
        tiles = _row_tiles(counts, kept[0])
        return _columns(gate, counts, operator("kept_swiglu_quantize_columns")(*kept, tiles, power_of_two))
    rows = _gate_and_up(gate, up)
    if rows is None:
        return NotImplemented
    return _columns(rows[0], counts, operator("swiglu_quantize_columns")(
        *rows, _row_tiles(counts, gate), power_of_two))


def _kept_tiles(gate: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor] | None:
    """Return codes and scales of gate and of up, [R, I] in bfloat16; None if the kernels don't take them so."""
    if not (isinstance(gate, BlockScaled) and isinstance(up, BlockScaled)):
        return None
    if gate.dtype != _BF16 or gate.ndim != 2 or gate.shape[1] % 8 or not gate.numel():
        return None
    return [_dense(part) for tiles in (gate, up) for part in (tiles.q, tiles.scale)]


def swiglu_backward_tiles(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, joint: bool,
                          counts: Sequence[int] | None = None):
    """Return tiles of both gradients, which the kernel makes side by side.

    Those of each are halves of the result where a tile ends between them; else each gradient is quantised by itself.
    """
    if grad.dtype != _BF16 or _no_columns(counts):
        return NotImplemented
    apart = not joint and gate.shape[-1] % TILE
    if (kept := _kept_tiles(gate, up)) is not None and not apart:
        tiles = _row_tiles(counts, kept[0])
        return _both_gradients(operator("kept_swiglu_backward_quantize")(_dense(grad), *kept, tiles, False), grad,
                               joint, counts)
    gate, up = plain(gate), plain(up)
    rows = _gate_and_up(gate, up)
    if rows is None:
        return NotImplemented
    if apart:
        return tuple(quantize_rows_and_columns(part, False, counts) for part in swiglu_backward(grad, gate, up))
    return _both_gradients(operator("swiglu_backward_quantize")(
        _dense(grad), *rows, _row_tiles(counts, gate), False), grad, joint, counts)


def _both_gradients(tiles: Sequence[torch.Tensor], grad: torch.Tensor, joint: bool, counts: Sequence[int] | None):
    q, scale, *columns = tiles
    columns = _columns(grad, counts, columns)
    if joint:
        return ((q, scale), columns),
    both = zip(*(part.chunk(2, 1) for part in (q, scale)), strict=True), zip(*(part.chunk(2) for part in columns))
    return tuple(zip(*both))


# RMSNorm with quantisation (fp8/norm.py) ------------------------------------------------------------------------------

def norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float, keep: bool):
    if x.dtype != _BF16 or not _takes(x):
        return NotImplemented
    q, scale, rstd, y = operator("norm_quantize_rows")(_dense(x.flatten(0, -2)), weight.float(), eps, keep, False)
    rows = x.shape[:-1]
    return q.view(x.shape), scale.view(*rows, -1), rstd.view(*rows, 1), y.view(x.shape) if keep else None


def norm_backward_quantize(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor):
    if x.dtype != _BF16 or grad.dtype != _BF16 or not _takes(x):
        return NotImplemented
    grad, x_RH = (_dense(part.flatten(0, -2)) for part in (grad, x))
    q, scale, *columns, grad_weight = operator("norm_backward_quantize")(
        grad, x_RH, weight.float(), rstd.flatten(), None, False)
    tiles = q.view(x.shape), scale.view(*x.shape[:-1], -1)
    return tiles, _columns(x_RH, None, columns), grad_weight.to(weight.dtype)


# GEMMs (fp8/gemm.py) --------------------------------------------------------------------------------------------------

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


def scaled_mm(a_q, a_s, b_q, b_s, out_dtype=_BF16):
    if not _fits_gemm(a_q, out_dtype):
        return NotImplemented
    operands = _operand(a_q, a_q.shape[1]), a_s.contiguous(), _operand(b_q, b_q.shape[1]), b_s.contiguous()
    return operator("scaled_mm")(*operands, out_dtype == torch.float32)


def grouped_scaled_mm(a_q, a_s, b_q, b_s, counts, out_dtype=_BF16):
    """Use tiles of 256 rows, which read b half as often, if no more than a tenth of their rows would be empty."""
    if not _fits_gemm(a_q, out_dtype):
        return NotImplemented
    operands = _operand(a_q, a_q.shape[1]), a_s.contiguous(), _operand(b_q, b_q.shape[2]), b_s.contiguous()
    tall = 0.9 * sum(-(-count // (2 * TILE)) for count in counts) * 2 * TILE <= sum(counts)
    tiles = table(_tall_tiles if tall else tile_rows, counts, a_q)
    return operator("grouped_scaled_mm")(*operands, tiles, tall, out_dtype == torch.float32)


def _padded_columns(q: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return codes of 128x1 tiles with every group padded to whole tiles; the reference's are not (widths that are no
    multiple of 8 are quantised there).
    """
    if q.shape[1] == sum(-(-count // TILE) for count in counts) * TILE:
        return q
    parts = q.contiguous().view(torch.uint8).split(list(counts), 1)
    return torch.cat([F.pad(part, (0, -part.shape[1] % TILE)) for part in parts], 1).view(q.dtype)


def grouped_scaled_mm_wgrad(a_q, a_s, b_q, b_s, counts, out_dtype=_BF16):
    if not _fits_gemm(a_q, out_dtype):
        return NotImplemented
    a_q, b_q = (_padded_columns(q, counts) for q in (a_q, b_q))
    groups = table(_depths, counts, a_q)
    return operator("grouped_scaled_mm_wgrad")(a_q, a_s.contiguous(), b_q, b_s.contiguous(), groups,
                                               out_dtype == torch.float32)
