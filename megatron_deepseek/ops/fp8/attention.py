"""Attention of the FP8 recipe: computed in the layer's dtype, its output kept once, as E5M6, for two backwards.

The output is read by attention's own backward (for the softmax's row term sum(do * o)) and by the weight gradient of
the linear after it. Both read the same E5M6 tensors. The linear's forward multiplies E4M3 tiles of the exact output.

Shapes: B batch, S queries and keys, N heads, D query and key width, V value width.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.attention import Output, Scores, attend, attend_backward
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled
from megatron_deepseek.ops.fp8.e5m6 import dequantize_e5m6, quantize_e5m6


_WHOLE = [...]  # the squares of attention over whole rows


class E5M6Output(Output):
    """The next layer gets E4M3 tiles. The kept E5M6 goes with them, so that the linear keeps the same tensors."""

    def give(self, y_BSV: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return E4M3 tiles of the output, which carry its E5M6 form, and that form."""
        kept = quantize_e5m6(y_BSV.flatten(0, 1))
        return BlockScaled(*encoding.quantize_1x128(y_BSV, power_of_two=True), y_BSV.dtype, kept), kept

    def restore(self, kept: tuple[torch.Tensor, ...], like_BSV: torch.Tensor) -> torch.Tensor:
        """Return the output as E5M6 has it, in the shape and dtype of `like_BSV`."""
        return dequantize_e5m6(*kept, like_BSV.shape[-1], like_BSV.dtype).view_as(like_BSV)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSND, k_BSND, v_BSNV, squares, scores: Scores, width: int):
        q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BSND, v_BSNV))
        out_BNSV, lse_BNS = _empty_results(q, v)
        for place in squares:
            out_BNSV[place], lse_BNS[place] = attend(q[place], k[place], v[place], scores)
        result, kept = E5M6Output().give(out_BNSV[..., :width].transpose(1, 2).flatten(-2))
        ctx.save_for_backward(q_BSND, k_BSND, v_BSNV, lse_BNS, *kept)
        ctx.squares, ctx.scores = squares, scores
        return result

    @staticmethod
    def backward(ctx, grad_BSV):
        q_BSND, k_BSND, v_BSNV, lse_BNS, *kept = ctx.saved_tensors
        shape = *q_BSND.shape[:-1], v_BSNV.shape[-1]
        grad, out = (_heads(x, shape) for x in (grad_BSV, E5M6Output().restore(kept, grad_BSV)))
        q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BSND, v_BSNV))
        parts = (attend_backward(grad[place], q[place], k[place], v[place], out[place], lse_BNS[place], ctx.scores)
                 for place in ctx.squares)
        gradients = next(parts) if ctx.squares == _WHOLE else _joined((q, k, v), ctx.squares, parts)
        return *(x.transpose(1, 2) for x in gradients), None, None, None


def _empty_results(q_BNSD: torch.Tensor, v_BNSV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q_BNSD.dtype, torch.float32)
    B, N, S, _ = q_BNSD.shape
    out_BSNV = q_BNSD.new_empty(B, S, N, v_BNSV.shape[-1])  # where documents follow each other its rows do too
    return out_BSNV.transpose(1, 2), q_BNSD.new_empty(B, N, S, dtype=wide)


def _joined(like: tuple[torch.Tensor, ...], squares: list, parts: Iterable[tuple[torch.Tensor, ...]]
            ) -> list[torch.Tensor]:
    """Return tensors like `like`, of which `parts` are those at `squares`."""
    whole = [torch.empty_like(x) for x in like]
    for place, of_square in zip(squares, parts, strict=True):
        for x, part in zip(whole, of_square, strict=True):
            x[place] = part
    return whole


def _heads(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a view of x [B, S, N * width] as [B, N, S, V], or a copy with zeros where V is wider; `shape`: B, S, N, V.
    """
    x_BSNW = x.reshape(*shape[:-1], -1)
    missing = shape[-1] - x_BSNW.shape[-1]
    return (F.pad(x_BSNW, (0, missing)) if missing else x_BSNW).transpose(1, 2)


def attention(q_BSND: torch.Tensor, k_BSND: torch.Tensor, v_BSNV: torch.Tensor, documents: Documents | None,
              scale: float, width: int) -> torch.Tensor:
    """Return what ops/attention.py's `attention` returns, [B, S, N * width], as E4M3 tiles with power-of-two scales."""
    squares = _WHOLE if documents is None else [
        (slice(row, row + 1), slice(None), place) for row, places in enumerate(documents.rows) for place in places]
    return _Attention.apply(q_BSND, k_BSND, v_BSNV, squares, Scores(scale, causal=True), width)
