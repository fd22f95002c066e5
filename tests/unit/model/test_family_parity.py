"""Grouped-query families against transformers' classes, and DeepSeekMoE-16B against a Llama with experts written out.

Logits and the gradient of every parameter, over architectures drawn at random, weights copied by name. As in
test_parity.py: float32, 1e-5 of the largest number for logits; gradients are sums of more terms. Left out, since
gradients are then rounding alone: a window of one token, and one expert whose weight is normalised to 1.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_family import CLASSES, deepseek_moe
from small_models import enliven, load, random_batch, weights_of, whole_model
from test_parity import compare_step

from megatron_deepseek.model.architecture.config import ModelConfig

BATCH, SEQ_LENGTH = 2, 9

DENSE = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
         "attn_implementation": "sdpa"}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_shared_experts": 2,
           "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def theirs(model_type: str, fields: dict):
    """Their model, and the config.json that it has, where it has one of this family's."""
    if model_type == "deepseek":
        return deepseek_moe(fields), fields | {"model_type": model_type}
    config_class, model_class = CLASSES[model_type]
    model = model_class(config_class(**fields))
    return model, model.config.to_dict()


def check(model_type: str, fields: dict, meshes) -> None:
    reference, written = theirs(model_type, fields)
    enliven(reference)
    config = ModelConfig.from_hf_dict(written)
    assert config.model_type == model_type and ModelConfig.from_hf_dict(config.to_hf_dict()) == config
    model = whole_model(config, meshes, SEQ_LENGTH, torch.float32)
    weights = weights_of(reference, torch.float32)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    load(model, weights)

    compare_step(model, reference, *random_batch(config, BATCH, SEQ_LENGTH))


CASES = {
    "llama": ("llama", DENSE | {"rope_parameters": LLAMA3 | {"rope_theta": 10.0}, "attention_bias": True}),
    "llama_multi_head": ("llama", DENSE | {"num_key_value_heads": 6}),
    "llama_odd_head": ("llama", DENSE | {"head_dim": 10, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", DENSE | {"rope_parameters": YARN | {"rope_theta": 100.0}, "tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", DENSE | WINDOW),
    "qwen2_layer_types": ("qwen2", DENSE | WINDOW | {
        "sliding_window": 2, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3": ("qwen3", DENSE | {"head_dim": 8, "rms_norm_eps": 0.1}),
    "qwen3_bias": ("qwen3", DENSE | {"head_dim": 4, "attention_bias": True, "tie_word_embeddings": True}),
    "deepseek": ("deepseek", DENSE | EXPERTS | {"num_key_value_heads": 6}),
    "deepseek_normalised": ("deepseek", DENSE | EXPERTS | {"norm_topk_prob": True, "attention_bias": True}),
    "deepseek_every_other": ("deepseek", DENSE | EXPERTS | {"first_k_dense_replace": 0, "moe_layer_freq": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(meshes, name):
    check(*CASES[name], meshes)


ROPES = (None, LLAMA3, YARN, YARN | {"attention_factor": 1.3}, YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
         YARN | {"mscale": 0.7, "beta_fast": 4.0}, {"rope_type": "linear", "factor": 3.0},
         {"rope_type": "dynamic", "factor": 4.0})


@st.composite
def architectures(draw) -> tuple[str, dict]:
    """Any mix of what the families have."""
    model_type, heads = draw(st.sampled_from(["llama", "qwen2", "qwen3", "deepseek"])), draw(st.sampled_from([2, 4, 6]))
    rope, layers = draw(st.sampled_from(ROPES)), draw(st.integers(1, 3))
    fields = DENSE | {
        "hidden_size": draw(st.sampled_from([12, 24])), "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([each for each in (1, 2, 3, 4, 6) if heads % each == 0])),
        "tie_word_embeddings": draw(st.booleans()), "rms_norm_eps": draw(st.sampled_from([1e-6, 0.1])),
        "rope_parameters": rope and rope | {"rope_theta": draw(st.sampled_from([50.0, 1e4]))},
        "max_position_embeddings": draw(st.sampled_from([5, 64])), "head_dim": draw(st.sampled_from([4, 6, 10])),
    }
    if model_type != "qwen2":
        fields["attention_bias"] = draw(st.booleans())
    if model_type == "deepseek":
        top_k = draw(st.integers(1, 8))
        fields |= EXPERTS | {"num_experts_per_tok": top_k, "norm_topk_prob": top_k > 1 and draw(st.booleans()),
                             "n_shared_experts": draw(st.integers(0, 2)),
                             "first_k_dense_replace": draw(st.integers(0, 2))}
    if model_type in ("qwen2", "qwen3") and draw(st.booleans()):
        fields |= {"use_sliding_window": True, "sliding_window": draw(st.integers(2, 10)),
                   "max_window_layers": draw(st.integers(0, layers))}
    return model_type, fields


@settings(max_examples=24, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(architecture=architectures())
def test_any_architecture(meshes, architecture):
    check(*architecture, meshes)
