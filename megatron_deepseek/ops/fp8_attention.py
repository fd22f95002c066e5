"""Attention of the FP8 recipe: computed in the layer's dtype, its output kept once, as E5M6, for two backwards.

Attention's own backward reads the output (for the softmax's row term sum(do * o)), and so does the weight gradient of
the linear after it. Both read the same E5M6 here; what the linear computes with are E4M3 tiles made of the exact output.

Shapes: B batch, S queries and keys, N heads, D query and key width, V value width.
"""

import torch
import torch.nn.functional as F

from megatron_deepseek.ops import fp8
from megatron_deepseek.ops.attention import Scores, attend, attend_backward
from megatron_deepseek.ops.block_scaled import BlockScaled
from megatron_deepseek.ops.e5m6 import dequantize_e5m6, quantize_e5m6


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSND, k_BSND, v_BSNV, scores: Scores, width: int):
        out_BNSV, lse_BNS = attend(*(x.transpose(1, 2) for x in (q_BSND, k_BSND, v_BSNV)), scores)
        out_BSV = out_BNSV[..., :width].transpose(1, 2).flatten(-2)
        kept = quantize_e5m6(out_BSV.flatten(0, 1))
        ctx.save_for_backward(q_BSND, k_BSND, v_BSNV, lse_BNS, *kept)
        ctx.scores = scores
        return BlockScaled(*fp8.quantize_1x128(out_BSV, power_of_two=True), out_BSV.dtype, kept)

    @staticmethod
    def backward(ctx, grad_BSV):
        q_BSND, k_BSND, v_BSNV, lse_BNS, *kept = ctx.saved_tensors
        out_BSV = dequantize_e5m6(*kept, grad_BSV.shape[-1], grad_BSV.dtype)
        grad, out = (_heads(x, v_BSNV) for x in (grad_BSV, out_BSV))
        q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BSND, v_BSNV))
        gradients = attend_backward(grad, q, k, v, out, lse_BNS, ctx.scores)
        return *(x.transpose(1, 2) for x in gradients), None, None


def _heads(x: torch.Tensor, v_BSNV: torch.Tensor) -> torch.Tensor:
    """[B, N, S, V] of x [B, S, N * width] or its rows, with zeros where v is wider."""
    x_BSNW = x.reshape(*v_BSNV.shape[:3], -1)
    return F.pad(x_BSNW, (0, v_BSNV.shape[-1] - x_BSNW.shape[-1])).transpose(1, 2)


def attention(q_BSND: torch.Tensor, k_BSND: torch.Tensor, v_BSNV: torch.Tensor, scores: Scores, width: int
              ) -> torch.Tensor:
    """[B, S, N * width] block-scaled, powers of two as scales; of V the first `width` columns, the others are zero."""
    return _Attention.apply(q_BSND, k_BSND, v_BSNV, scores, width)
