"""Conversion of the grouped-query families: bit for bit there and back, and Megatron's one matrix of q, k and v."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_checkpoints import all_tensors, assert_identical, convert, random_weights, write_hf

from megatron_deepseek.checkpoint.convert.megatron import megatron_places
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling

LLAMA = ModelConfig(
    vocab_size=300, hidden_size=136, intermediate_size=264, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64, rope_theta=500.0,
    rope_scaling=RopeScaling("llama3", 8.0, 32))
CONFIGS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True, tie_word_embeddings=True, rope_scaling=RopeScaling("yarn", 4.0, 16),
                     sliding_window=7, layer_types=("full_attention", "sliding_attention")),
    "qwen3": replace(LLAMA, qk_norm=True, num_key_value_heads=6, rope_scaling=None),
    "deepseek": replace(LLAMA, num_key_value_heads=6, attention_bias=True, moe_intermediate_size=140,
                        n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1),
    "llama with MTP": replace(LLAMA, num_nextn_predict_layers=1),
}


def directory_of(path, config: ModelConfig):
    return write_hf(path, random_weights(config, torch.bfloat16), config.to_hf_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name):
    """Through a native checkpoint; config.json says the same architecture, in the same family."""
    hf = directory_of(tmp_path / "hf", CONFIGS[name])
    assert convert("hf", "native", hf, tmp_path / "native") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back") == 0
    assert_identical(all_tensors(tmp_path / "back"), all_tensors(hf))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == json.loads((hf / "config.json").read_text())
    assert ModelConfig.from_hf_dict(written) == CONFIGS[name]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_through_megatron(tmp_path, name):
    """And rows of linear_qkv as megatron-core's SelfAttention takes them apart: by heads of keys, q before k before v.
    """
    config = CONFIGS[name]
    hf = directory_of(tmp_path / "hf", config)
    assert convert("hf", "megatron", hf, tmp_path / "mcore") == 0
    assert convert("megatron", "hf", tmp_path / "mcore", tmp_path / "back") == 0
    weights = all_tensors(hf)
    assert_identical(all_tensors(tmp_path / "back"), weights)
    groups, size = config.num_key_value_heads, config.head_dim
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        shape = (groups * (config.num_attention_heads // groups + 2) * size, *(() if kind == "bias" else (136,)))
        whole = {f"decoder.layers.1.self_attention.linear_qkv.{kind}": torch.empty(shape, dtype=torch.bfloat16)}
        dcp.load(whole, checkpoint_id=tmp_path / "mcore" / "iter_0000000", no_dist=True)
        (found,) = whole.values()
        per_group = found.view(groups, -1, *shape[1:])
        q, k, v = per_group.split([config.num_attention_heads // groups * size, size, size], 1)
        for projection, part in (("q", q), ("k", k), ("v", v)):
            expected = weights[f"model.layers.1.self_attn.{projection}_proj.{kind}"]
            assert torch.equal(part.flatten(0, 1), expected), (projection, kind)


def test_biases_that_megatron_does_not_have():
    with pytest.raises(ValueError, match="attention_bias true of llama has no counterpart in megatron-core"):
        megatron_places(replace(LLAMA, attention_bias=True))
