"""FLOPs against a case worked by hand, torch's own counter, and what DeepSeek published for V3."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.planning.flops import (
    active_matmul_weights, attention_core_flops, model_flops_per_token, peak_flops)

TINY = ModelConfig(
    vocab_size=100, hidden_size=8, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=4,
    qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=7, q_lora_rank=6, moe_intermediate_size=5, n_routed_experts=10,
    n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1, num_nextn_predict_layers=1)
V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536,
    moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
    first_k_dense_replace=3, n_group=8, topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid",
    num_nextn_predict_layers=1)
V2_LITE = ModelConfig(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_intermediate_size=1408,
    n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1)


def test_tiny_case_worked_by_hand():
    """One dense layer, one of experts, one MTP module of experts, over 16 tokens."""
    attention = 8 * 6 + 6 * 10 + 8 * (4 + 2) + 4 * (6 + 14) + 14 * 8  # q_a, q_b, kv_a, kv_b, o: 348
    dense, experts = 3 * 8 * 20, 10 * 8 + 4 * 3 * 8 * 5               # 480; router 80 and four experts 480
    weights = 3 * attention + dense + 2 * experts + 2 * 8 * 100 + 16 * 8  # two heads, eh_proj
    core = 2 * 2 * 16 * 5 + 2 * 2 * 16 * 7                            # q k^T and p v
    assert active_matmul_weights(TINY) == weights == 4372
    assert model_flops_per_token(TINY, 16) == 3 * (2 * weights + 3 * core) == 33144


def test_attention_core_is_what_torch_counts():
    tokens, heads = 16, TINY.num_attention_heads
    q, k, v = (torch.zeros(1, heads, tokens, size, device="meta") for size in (5, 5, 7))
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(-1, -2)) @ v
    assert counter.get_total_flops() == tokens * attention_core_flops(TINY, tokens)


def test_v3_agrees_with_deepseeks_report():
    """432 TFLOPS non-causal and 43.73 % at 272.80e9 tokens a day on 2,048 H800 (arXiv 2505.09343, table 4)."""
    tokens_per_second = 272.80e9 / 86400 / 2048
    published = 0.4373 * peak_flops("NVIDIA H800") / tokens_per_second
    without_mtp = dataclasses.replace(V3, num_nextn_predict_layers=0)
    # They leave out the router, 0.2 %, and round to four digits.
    assert model_flops_per_token(without_mtp, 4096) == pytest.approx(published, rel=3e-3)
    assert model_flops_per_token(V3, 4096) == pytest.approx(291.8e9, rel=1e-3)
    causal = model_flops_per_token(without_mtp, 4096) - 3 * 61 * attention_core_flops(V3, 4096) / 2
    assert causal / peak_flops("NVIDIA H800") * tokens_per_second == pytest.approx(0.3894, rel=3e-3)


@pytest.mark.parametrize("config, active, places", [(V3, 37.0e9, 0.02), (V2_LITE, 2.4e9, 0.12)])
def test_active_parameters_are_the_published(config, active, places):
    """Published counts are rounded; V2-Lite's 2.4B is 2.45e9 without the embedding."""
    without_mtp = dataclasses.replace(config, num_nextn_predict_layers=0)
    assert active_matmul_weights(without_mtp) == pytest.approx(active, rel=places)


@pytest.mark.parametrize("name, flops", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA GH200 480GB", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10", 125e12),
    ("NVIDIA B200", 2250e12), ("NVIDIA L4", 121e12), ("NVIDIA GeForce GTX 1080", None), ("cpu", None)])
def test_peak_of_known_devices(name, flops):
    assert peak_flops(name) == flops
