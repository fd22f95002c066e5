"""Adapters of transformer-engine, apex and torch, held to stand-ins with their libraries' signatures and layouts.

The libraries need a GPU. The stand-ins take what the constructors and functions of their sources take, of transformer-
engine with and without a workspace argument, and compute by the layouts that are documented there what those would.
"""

import inspect
import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from megatron_deepseek.ops.attention import Scores, attention, cuda_forward, plain_backward, plain_forward
from megatron_deepseek.ops.backends import alternatives
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.fp8.gemm import grouped_scaled_mm, grouped_scaled_mm_wgrad, scaled_mm
from megatron_deepseek.ops.norm import norm_backward, norm_forward, rms_norm


class DType(Enum):
    kFloat8E4M3 = 7


class Quantizer:
    def __init__(self, fp8_dtype, *, rowwise, columnwise, amax_epsilon=0.0, force_pow_2_scales=True,
                 block_scaling_dim=2):
        assert fp8_dtype is DType.kFloat8E4M3 and rowwise and not columnwise
        self.block_scaling_dim = block_scaling_dim


class QTensor:
    """`rowwise_scale_inv`: [ceil(M / 128), ceil(K / 128) to 4] of blocks, [ceil(K / 128), M to 4] of 1x128 tiles."""

    def __init__(self, *, shape, dtype, fp8_dtype, rowwise_data, rowwise_scale_inv, columnwise_data,
                 columnwise_scale_inv, quantizer, is_2D_scaled, requires_grad=False):
        assert rowwise_data.dtype == torch.uint8 and rowwise_data.is_contiguous() and rowwise_data.shape == shape
        assert columnwise_data is None and columnwise_scale_inv is None
        assert quantizer.block_scaling_dim == (2 if is_2D_scaled else 1)
        rows, columns = shape
        tiles = -(-rows // 128) if is_2D_scaled else rows, -(-columns // 128)
        outer, inner = tiles if is_2D_scaled else tiles[::-1]
        assert rowwise_scale_inv.shape == (outer, -(-inner // 4) * 4) and rowwise_scale_inv.is_contiguous()
        scales = rowwise_scale_inv[:, :inner]
        spread = scales.repeat_interleave(128, 0)[:rows] if is_2D_scaled else scales.t()
        self.numbers = rowwise_data.view(encoding.E4M3).float() * spread.repeat_interleave(128, 1)[:, :columns]


def general_gemm(A, B, out_dtype=None, quantization_params=None, gelu=False, gelu_in=None, alpha=1.0, beta=None,
                 accumulate=False, layout="TN", out=None, bias=None, use_split_accumulator=False, grad=False):
    assert layout == "TN" and use_split_accumulator
    return (B.numbers @ A.numbers.t()).to(out_dtype), None, None, None


def old_general_gemm(A, B, workspace, out_dtype=None, quantization_params=None, gelu=False, gelu_in=None,
                     accumulate=False, layout="TN", out=None, bias=None, use_split_accumulator=False, grad=False):
    assert workspace == "workspace"
    return general_gemm(A, B, out_dtype, layout=layout, use_split_accumulator=use_split_accumulator)


class Attention:
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
                 attn_mask_type="causal", window_size=None, softmax_scale=None):
        assert (qkv_format, attn_mask_type, attention_dropout) == ("bshd", "causal", 0.0)
        self.heads, self.widths, self.scale = num_attention_heads, kv_channels, softmax_scale

    def __call__(self, query_layer, key_layer, value_layer):
        assert query_layer.shape[2:] == (self.heads, self.widths[0]) and value_layer.shape[3] == self.widths[1]
        q, k, v = (x.transpose(1, 2) for x in (query_layer, key_layer, value_layer))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return y.transpose(1, 2).flatten(-2)  # [B, S, N * V], as transformer-engine gives it


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype and tuple(normalized_shape) == weight.shape
    return F.rms_norm(input, normalized_shape, weight, eps)


def install(monkeypatch, **modules: dict) -> None:
    for name, members in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture(params=[general_gemm, old_general_gemm], ids=["", "with a workspace"])
def transformer_engine(request, monkeypatch):
    install(monkeypatch, transformer_engine={}, transformer_engine_torch={"DType": DType},
            transformer_engine__pytorch={"DotProductAttention": Attention},
            transformer_engine__pytorch__cpp_extensions={"general_gemm": request.param},
            transformer_engine__pytorch__module={}, transformer_engine__pytorch__tensor={},
            transformer_engine__pytorch__module__base={"get_workspace": lambda: "workspace"},
            transformer_engine__pytorch__tensor__float8_blockwise_tensor={
                "Float8BlockQuantizer": Quantizer, "Float8BlockwiseQTensor": QTensor})


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def operands(rows: int, blocks: bool) -> tuple[encoding.Tiles, encoding.Tiles]:
    quantize = encoding.quantize_128x128 if blocks else encoding.quantize_1x128
    return encoding.quantize_1x128(randn(rows, 272)), quantize(randn(208, 272))


@pytest.mark.parametrize("blocks", [True, False], ids=["forward and dgrad", "wgrad"])
def test_transformer_engine_product(transformer_engine, blocks):
    """Float32 products in another order: 1e-5."""
    a, b = operands(150, blocks)
    got = alternatives.transformer_engine_scaled_mm(*a, *b, torch.float32)
    torch.testing.assert_close(got, scaled_mm(*a, *b, torch.float32), rtol=1e-5, atol=1e-4)


def test_what_transformer_engine_does_not_take(transformer_engine):
    a, b = encoding.quantize_1x128(randn(3, 40)), encoding.quantize_128x128(randn(16, 40))
    assert alternatives.transformer_engine_scaled_mm(*a, *b) is NotImplemented
    assert alternatives.transformer_engine_scaled_mm(*a, *b, torch.float64) is NotImplemented


def test_transformer_engine_attention(transformer_engine):
    alternatives.attention_module.cache_clear()
    q, k, v = (randn(2, 5, 3, width).bfloat16() for width in (24, 24, 16))
    got = alternatives.transformer_engine_attention(q, k, v, None, 0.2, 16)
    torch.testing.assert_close(got, attention(q, k, v, None, 0.2, 16), rtol=2**-6, atol=2**-6)
    assert alternatives.transformer_engine_attention(q, k, v, torch.zeros(2, 5), 0.2, 16) is NotImplemented
    assert alternatives.transformer_engine_attention(q, k, F.pad(v, (0, 8)), None, 0.2, 16) is NotImplemented
    alternatives.attention_module.cache_clear()


def test_apex_norm(monkeypatch):
    install(monkeypatch, apex={}, apex__normalization={}, apex__normalization__fused_layer_norm={
        "fused_rms_norm_affine": fused_rms_norm_affine})
    x, weight = randn(2, 3, 40).bfloat16(), randn(40)
    torch.testing.assert_close(alternatives.apex_rms_norm(x, weight, 1e-6), rms_norm(x, weight.bfloat16(), 1e-6),
                               rtol=2**-6, atol=2**-6)


def test_torch_norm_backward_takes_what_it_is_given():
    """It has no CPU form: its shapes and dtypes, on the meta device, are the reference's."""
    x, weight = randn(2, 3, 40).bfloat16(), randn(40).bfloat16()
    _, rstd = norm_forward(x, weight, 1e-6)
    expected = norm_backward(x, x, weight, rstd)
    got = alternatives.torch_norm_backward(*(part.to("meta") for part in (x, x, weight, rstd)))
    assert [(part.shape, part.dtype) for part in got] == [(part.shape, part.dtype) for part in expected]


@pytest.mark.parametrize("blocks", [True, False])
def test_torch_scaled_mm_is_called_as_its_source_asks(blocks, monkeypatch):
    """ATen's rules for scales: 1x128 [M, k] with strides (1, M); 128x128 [k to 4, N / 128] with strides (1, k to 4)."""
    a, b = operands(144, blocks)
    seen = []
    real = F.scaled_mm
    monkeypatch.setattr(F, "scaled_mm", lambda *args, **kwargs: seen.append(
        inspect.signature(real).bind(*args, **kwargs).arguments) or torch.empty(0))
    alternatives.torch_scaled_mm(*a, *b)
    (call,) = seen
    assert call["mat_a"].is_contiguous() and call["mat_b"].t().is_contiguous() and call["mat_b"].shape == (272, 208)
    assert call["scale_a"].shape == (144, 3) and call["scale_a"].stride() == (1, 144)
    assert call["scale_recipe_a"] == F.ScalingType.BlockWise1x128
    shape, strides = ((4, 2), (1, 4)) if blocks else ((208, 3), (1, 208))
    assert call["scale_b"].shape == shape and call["scale_b"].stride() == strides
    assert call["scale_recipe_b"] == (F.ScalingType.BlockWise128x128 if blocks else F.ScalingType.BlockWise1x128)


def hopper_scaled_mm(mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, output_dtype):
    """What cuBLASLt computes, K a multiple of 16, of the layouts that the test above holds."""
    assert mat_a.shape[1] % 16 == 0 and mat_a.is_contiguous() and mat_b.t().is_contiguous()
    b_s = scale_b if scale_recipe_b == F.ScalingType.BlockWise1x128 else scale_b.t()[:, :-(-mat_a.shape[1] // 128)]
    return scaled_mm.reference(mat_a, scale_a.contiguous(), mat_b.t(), b_s, output_dtype)


def test_torch_grouped_products(monkeypatch):
    """Groups of any number of rows: wgrad's K is padded with zero codes; one of no rows is left to the reference."""
    monkeypatch.setattr(F, "scaled_mm", hopper_scaled_mm)
    counts = [5, 0, 130]
    x, grad, weight = randn(135, 272), randn(135, 48), randn(3, 48, 272)
    operands = *encoding.quantize_1x128(x), *encoding.quantize_128x128(weight), counts
    assert torch.equal(alternatives.torch_grouped_scaled_mm(*operands), grouped_scaled_mm(*operands))
    columns = (part for each in (grad, x) for part in encoding.quantize_128x1(each, False, counts))
    operands = *columns, counts, torch.float32
    torch.testing.assert_close(alternatives.torch_grouped_scaled_mm_wgrad(*operands),
                               grouped_scaled_mm_wgrad(*operands), rtol=1e-6, atol=1e-5)


def cudnn_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale):
    """The log-sum-exp has a dimension of 1 at its end, as torch 2.11 with CUDA gives it (FakeTensor)."""
    assert attn_bias is None and compute_log_sumexp and not return_debug_mask and dropout_p == 0.0
    out, lse = plain_forward(query, key, value, Scores(scale, is_causal))
    return out, lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], torch.zeros(()), torch.zeros(()), None


def cudnn_backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                   cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale):
    assert attn_bias is cum_seq_q is cum_seq_k is None and (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == (*query.shape[:3], 1) and philox_seed.dtype == torch.int64 and dropout_p == 0.0
    return plain_backward(grad_out, query, key, value, out, logsumexp.squeeze(-1), Scores(scale, is_causal))


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_attention(causal, monkeypatch):
    """MLA's widths, 192 and 128, without padding: forward and backward with a log-sum-exp as parts are merged by."""
    names = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")
    for name, stand_in in zip(names, (cudnn_forward, cudnn_backward)):
        takes = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]  # noqa: SLF001
        assert takes == list(inspect.signature(stand_in).parameters)
        monkeypatch.setattr(torch.ops.aten, name, stand_in)
    q, k, v, grad = (randn(1, 2, 5, width).bfloat16() for width in (192, 192, 128, 128))
    scores = Scores(0.1, causal)
    got, expected = alternatives.cudnn_attend(q, k, v, scores), plain_forward(q, k, v, scores)
    assert all(torch.equal(*pair) for pair in zip(got, expected))
    got = alternatives.cudnn_attend_backward(grad, q, k, v, *expected, scores)
    assert all(torch.equal(*pair) for pair in zip(got, plain_backward(grad, q, k, v, *expected, scores)))


def test_cudnn_attention_has_the_shapes_of_flash_attention():
    """By torch's own rules, on the meta device: MLA's widths, and a log-sum-exp without a last dimension of 1."""
    q, k, v, grad = (torch.empty(2, 4, 160, width, dtype=torch.bfloat16, device="meta")
                     for width in (192, 192, 128, 128))
    scores = Scores(0.1, causal=True)
    ours, flash = alternatives.cudnn_attend(q, k, v, scores), cuda_forward(q, k, v, scores)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in flash]
    ours = alternatives.cudnn_attend_backward(grad, q, k, v, *ours, scores)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in (q, k, v)]


def test_what_cudnn_does_not_take():
    q, v = randn(1, 2, 5, 192).bfloat16(), randn(1, 2, 5, 192).bfloat16()
    assert alternatives.cudnn_attend(q, q, v, Scores(0.1)) is NotImplemented
    assert alternatives.cudnn_attend(*(x[..., :64].float() for x in (q, q, v)), Scores(0.1)) is NotImplemented
    assert alternatives.cudnn_attend(*(x[..., :64] for x in (q, q[:, :1], v[:, :1])), Scores(0.1)) is NotImplemented
