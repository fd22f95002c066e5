"""Conversion of the grouped-query families: bit for bit there and back, and Megatron's one matrix of q, k and v."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from live_megatron import exchange
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

    Its layers are stacked, since all are alike.
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
        whole = {f"decoder.layers.self_attention.linear_qkv.{kind}": torch.empty((2, *shape), dtype=torch.bfloat16)}
        dcp.load(whole, checkpoint_id=tmp_path / "mcore" / "iter_0000000", no_dist=True)
        (found,) = whole.values()
        per_group = found[1].view(groups, -1, *shape[1:])
        q, k, v = per_group.split([config.num_attention_heads // groups * size, size, size], 1)
        for projection, part in (("q", q), ("k", k), ("v", v)):
            expected = weights[f"model.layers.1.self_attn.{projection}_proj.{kind}"]
            assert torch.equal(part.flatten(0, 1), expected), (projection, kind)


def test_layers_apart(tmp_path):
    """As megatron-core stores layers that it does not take for alike."""
    config, weights = CONFIGS["qwen2"], random_weights(CONFIGS["qwen2"], torch.float32)
    apart, state = frozenset({"decoder.layers.0.input_layernorm.weight"}), {}
    for place in megatron_places(config, apart):
        whole, start = state.setdefault(place.whole, torch.zeros(place.whole_shape)), 0
        for region in place.regions():
            stop = start + region.shape[0]
            whole[region.place[0]:region.end[0]] = weights[place.name][start:stop]
            start = stop
    assert "decoder.layers.1.self_attention.linear_qkv.bias" in state
    dcp.save(state, checkpoint_id=tmp_path / "mcore" / "release", no_dist=True)
    (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").write_text("release\n")
    hf = write_hf(tmp_path / "hf", weights, config.to_hf_dict())
    assert convert("megatron", "hf", tmp_path / "mcore", tmp_path / "back", "--assets", str(hf)) == 0
    assert_identical(all_tensors(tmp_path / "back"), weights)


@pytest.mark.slow
def test_a_live_model_of_megatron_says_what_transformers_does(tmp_path):
    """Qwen2: both read the same weights, one of them through the conversion; then Megatron's own, the other way."""
    pytest.importorskip("megatron.core", minversion="0.16")
    transformers = pytest.importorskip("transformers")
    live = exchange(tmp_path, replace(CONFIGS["qwen2"], rope_scaling=None, sliding_window=None, layer_types=()), 20)
    for which, directory in live.directories.items():
        model = transformers.Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            expected = model(live.tokens).logits
        torch.testing.assert_close(live.said[which][0], expected, rtol=1e-4, atol=1e-4)


def test_biases_that_megatron_does_not_have():
    with pytest.raises(ValueError, match="attention_bias true of llama has no counterpart in megatron-core"):
        megatron_places(replace(LLAMA, attention_bias=True))
