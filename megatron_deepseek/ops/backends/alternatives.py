"""Operators of torch, apex and transformer-engine for CUDA tensors, with the references' arguments (registry.py).

None has run here yet: their libraries need a GPU. Tests hold them to the signatures and layouts in their sources
(tests/unit/ops/backends/test_alternatives.py). They return NotImplemented for what the reference must do.
"""

import functools
import inspect

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.attention import Scores
from megatron_deepseek.ops.backends.kernels import TILE
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.fp8.gemm import depths_of_groups, rows_of_groups, scaled_mm


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float):
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor):
    return torch.ops.aten._fused_rms_norm_backward(grad.contiguous(), x, weight.shape, rstd, weight, (True, True))


def apex_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float):
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight.to(x.dtype), weight.shape, eps)


@functools.cache
def attention_module(heads: int, key_width: int, value_width: int, scale: float):
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, (key_width, value_width), attention_dropout=0.0, qkv_format="bshd",
                               attn_mask_type="causal", softmax_scale=scale)


def transformer_engine_attention(q_BSND: torch.Tensor, k_BSND: torch.Tensor, v_BSNV: torch.Tensor,
                                 documents: Documents | None, scale: float, width: int):
    """Return attention of whole sequences in 16 bits; NotImplemented for documents or padded values."""
    if documents is not None or width != v_BSNV.shape[-1] or q_BSND.dtype not in (torch.bfloat16, torch.float16):
        return NotImplemented
    attend = attention_module(q_BSND.shape[2], q_BSND.shape[3], width, scale)
    return attend(q_BSND, k_BSND, v_BSNV)


def torch_scaled_mm(a_q, a_s, b_q, b_s, out_dtype=torch.bfloat16):
    """Call torch's scaled_mm, which takes scales by columns; those of 128x128 padded to a multiple of 4 along K.

    Codes are padded to a multiple of 16 along K.
    """
    from torch.nn.functional import ScalingType

    if b_q.shape[0] % 16 or not a_q.numel() or out_dtype not in (torch.bfloat16, torch.float32):
        return NotImplemented
    if b_s.shape[0] == b_q.shape[0]:
        recipe, scales = ScalingType.BlockWise1x128, b_s.t().contiguous().t()
    else:
        assert b_s.shape[0] == -(-b_q.shape[0] // TILE), (b_s.shape, b_q.shape)
        recipe, scales = ScalingType.BlockWise128x128, F.pad(b_s, (0, -b_s.shape[1] % 4)).t()
    a_q, b_q = (_padded_codes(q) for q in (a_q, b_q))
    return F.scaled_mm(a_q, b_q.t(), a_s.t().contiguous().t(), ScalingType.BlockWise1x128,
                       scales, recipe, output_dtype=out_dtype)


def cudnn_attend(q_BNSD: torch.Tensor, k_BNKD: torch.Tensor, v_BNKV: torch.Tensor, scores: Scores):
    """Call cuDNN's attention, which takes values narrower than keys: flash attention pads them from 128 to 192."""
    if not _cudnn_takes(q_BNSD, k_BNKD, v_BNKV):
        return NotImplemented
    out_BNSV, lse_BNS1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BNSD, k_BNKD, v_BNKV, None, True, 0.0, scores.causal, False, scale=scores.scale)
    return out_BNSV, lse_BNS1.squeeze(-1)


def cudnn_attend_backward(grad_BNSV, q_BNSD, k_BNKD, v_BNKV, out_BNSV, lse_BNS, scores: Scores):
    """Return the gradients of q, k and v. Nothing is dropped, so the random state is not read."""
    if not _cudnn_takes(q_BNSD, k_BNKD, v_BNKV):
        return NotImplemented
    no_state = torch.zeros((), dtype=torch.int64, device=q_BNSD.device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad_BNSV, q_BNSD, k_BNKD, v_BNKV, out_BNSV, lse_BNS.contiguous().unsqueeze(-1), no_state, no_state, None, None,
        None, q_BNSD.shape[2], k_BNKD.shape[2], 0.0, scores.causal, scale=scores.scale)


def _cudnn_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    widths = q.shape[-1], v.shape[-1]
    fits = all(width % 8 == 0 for width in widths) and (max(widths) <= 128 or widths == (192, 128))
    return fits and q.dtype in (torch.bfloat16, torch.float16) and q.shape[1] == k.shape[1]


def _padded_codes(q: torch.Tensor) -> torch.Tensor:
    return F.pad(q.view(torch.uint8), (0, -q.shape[1] % 16)).view(q.dtype) if q.shape[1] % 16 else q.contiguous()


def _torch_or_reference(*operands) -> torch.Tensor:
    result = torch_scaled_mm(*operands)
    return scaled_mm.reference(*operands) if result is NotImplemented else result


def torch_grouped_scaled_mm(a_q, a_s, b_q, b_s, counts, out_dtype=torch.bfloat16):
    """Call torch's scaled_mm for each group."""
    return rows_of_groups(_torch_or_reference, a_q, a_s, b_q, b_s, counts, out_dtype)


def torch_grouped_scaled_mm_wgrad(a_q, a_s, b_q, b_s, counts, out_dtype=torch.bfloat16):
    """Call torch's scaled_mm for each group."""
    return depths_of_groups(_torch_or_reference, a_q, a_s, b_q, b_s, counts, out_dtype)


def transformer_engine_scaled_mm(a_q, a_s, b_q, b_s, out_dtype=torch.bfloat16):
    """Call the GEMM of transformer-engine's blockwise recipe: its `te.Linear`'s general_gemm on our codes and scales.

    te.Linear itself would quantise weights at each use and own them, their gradients and their communication. As there,
    the weight is A and the input is B. For wgrad both have 1x128 scales.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    if a_q.shape[1] % 16 or b_q.shape[0] % 16 or not a_q.numel() or out_dtype not in (torch.bfloat16, torch.float32):
        return NotImplemented
    operands = _transformer_engine_tensor(b_q, b_s), _transformer_engine_tensor(a_q, a_s)
    if "workspace" in inspect.signature(general_gemm).parameters:  # older releases have it
        from transformer_engine.pytorch.module.base import get_workspace

        return general_gemm(*operands, get_workspace(), out_dtype, layout="TN", use_split_accumulator=True)[0]
    return general_gemm(*operands, out_dtype, layout="TN", use_split_accumulator=True)[0]


def _transformer_engine_tensor(q: torch.Tensor, scale: torch.Tensor):
    """Return a Float8BlockwiseQTensor [M, K] that is read by rows.

    It has the scales of 1x128 tiles transposed, [k, M], and those of 128x128 blocks as here; their last dimension is
    padded to a multiple of 4.
    """
    import transformer_engine_torch
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor

    in_blocks = scale.shape[0] != q.shape[0]
    scales = scale if in_blocks else scale.t()
    kind = transformer_engine_torch.DType.kFloat8E4M3
    quantizer = Float8BlockQuantizer(kind, rowwise=True, columnwise=False, force_pow_2_scales=False,
                                     block_scaling_dim=2 if in_blocks else 1)
    return Float8BlockwiseQTensor(
        shape=q.shape, dtype=torch.bfloat16, fp8_dtype=kind, rowwise_data=q.contiguous().view(torch.uint8),
        rowwise_scale_inv=F.pad(scales, (0, -scales.shape[1] % 4)).contiguous(), columnwise_data=None,
        columnwise_scale_inv=None, quantizer=quantizer, is_2D_scaled=in_blocks)
