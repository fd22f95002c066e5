"""Operators of torch, apex and transformer-engine with the references' arguments, for CUDA tensors (registry.py).

None has run here yet: their libraries need a GPU. NotImplemented: the reference must do it.
"""

import functools

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.kernels import TILE


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float):
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor):
    return torch.ops.aten._fused_rms_norm_backward(grad.contiguous(), x, weight.shape, rstd, weight, (True, True))


def apex_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float):
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight.to(x.dtype), weight.shape, eps)


@functools.cache
def _attention_module(heads: int, key_width: int, value_width: int, scale: float):
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, (key_width, value_width), attention_dropout=0.0, qkv_format="bshd",
                               attn_mask_type="causal", softmax_scale=scale)


def transformer_engine_attention(q_BSND: torch.Tensor, k_BSND: torch.Tensor, v_BSNV: torch.Tensor,
                                 documents_BS: torch.Tensor | None, scale: float, width: int):
    """16 bits, whole sequences, and values of their own width alone."""
    if documents_BS is not None or width != v_BSNV.shape[-1] or q_BSND.dtype not in (torch.bfloat16, torch.float16):
        return NotImplemented
    attend = _attention_module(q_BSND.shape[2], q_BSND.shape[3], width, scale)
    return attend(q_BSND, k_BSND, v_BSNV)


def torch_scaled_mm(a_q, a_s, b_q, b_s, out_dtype=torch.bfloat16):
    """torch.nn.functional.scaled_mm. Scales go in by columns, those of 128x128 padded to a multiple of 4 along K."""
    from torch.nn.functional import ScalingType

    if a_q.shape[1] % 16 or b_q.shape[0] % 16 or not a_q.numel() or out_dtype not in (torch.bfloat16, torch.float32):
        return NotImplemented
    if b_s.shape[0] == b_q.shape[0]:
        recipe, scales = ScalingType.BlockWise1x128, b_s.t().contiguous().t()
    else:
        assert b_s.shape[0] == -(-b_q.shape[0] // TILE), (b_s.shape, b_q.shape)
        recipe, scales = ScalingType.BlockWise128x128, F.pad(b_s, (0, -b_s.shape[1] % 4)).t()
    return F.scaled_mm(a_q.contiguous(), b_q.contiguous().t(), a_s.t().contiguous().t(), ScalingType.BlockWise1x128,
                       scales, recipe, output_dtype=out_dtype)
