"""The whole model against transformers' DeepseekV2ForCausalLM and DeepseekV3ForCausalLM, weights copied by name.

Logits and the gradient of every parameter, over architectures drawn at random. transformers computes norms, router
and rotary tables in float32 whatever the model's dtype, so float32 is what can be compared: a few roundings, 1e-5 of
the largest number for logits; gradients are sums of more terms. test_reference.py does float64.

Left out, because transformers departs there from DeepSeek's own code: norm_topk_prob of V2 (ignored), top-1 with
norm_topk_prob (normalised to a constant), moe_layer_freq (ignored), YaRN without mscale_all_dim (mscale ignored).
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import enliven, forward, gradients_of, load, random_batch, relative_error, weights_of, whole_model
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_deepseek.model.architecture.config import ModelConfig

LOGITS, GRADIENT = 1e-5, 5e-5
BATCH, SEQ_LENGTH = 2, 9

COMMON = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "moe_intermediate_size": 12,
          "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 10,
          "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 12,
          "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6,
          "max_position_embeddings": 64, "attn_implementation": "sdpa"}
V2 = COMMON | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}
V3 = COMMON | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
               "num_nextn_predict_layers": 0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4.0,
        "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 1.0}
SCALINGS = (YARN, {"rope_type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 4.0})


def theirs(fields: dict):
    if "topk_method" in fields:
        return DeepseekV2ForCausalLM(DeepseekV2Config(**fields))
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields))


def check(fields: dict, meshes) -> None:
    """Our model reads transformers' own config and weights, and must give its logits and gradients."""
    reference = theirs(fields)
    enliven(reference)
    config = ModelConfig.from_hf_dict(reference.config.to_dict())
    model = whole_model(config, meshes, SEQ_LENGTH, torch.float32)
    weights = weights_of(reference, torch.float32)
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    load(model, {name: weight for name, weight in weights.items() if weight.numel()})

    compare_step(model, reference, *random_batch(config, BATCH, SEQ_LENGTH))


def compare_step(model, reference, tokens, labels, mask) -> None:
    """Logits of a batch, and the gradient of every parameter of its loss."""
    expected = reference(tokens).logits
    F.cross_entropy(expected[mask], labels[mask]).backward()
    outcome = forward(model, tokens, labels, mask)
    outcome.loss.backward()
    assert relative_error(outcome.logits[0], expected) < LOGITS
    compare_gradients(model, reference)


def compare_gradients(model, reference) -> None:
    """Every parameter's; one that transformers left without a gradient (an expert without tokens) is zero here."""
    expected = {name: p.grad if p.grad is not None else torch.zeros_like(p)
                for name, p in reference.named_parameters() if p.numel()}
    errors = {name: relative_error(gradient, expected[name]) for name, gradient in gradients_of(model).items()
              if expected[name].abs().max() > 0 or gradient.abs().max() > 0}
    assert errors.keys() <= expected.keys()
    wrong = {name: error for name, error in errors.items() if error > GRADIENT}
    assert not wrong, wrong


CASES = {
    "v2": V2,
    "v2_lite": V2 | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
                     "routed_scaling_factor": 1.0, "n_shared_experts": 2},
    "v2_all_groups": V2 | {"topk_group": 4},
    "v2_bias": V2 | {"attention_bias": True},
    "v2_yarn": V2 | {"rope_parameters": YARN | {"rope_theta": 500.0}},
    "v2_tied": V2 | {"tie_word_embeddings": True},
    "v2_other_eps": V2 | {"rms_norm_eps": 0.1},
    "v3": V3,
    "v3_not_normalised": V3 | {"norm_topk_prob": False},
    "v3_one_group": V3 | {"n_group": 1, "topk_group": 1},
    "v3_all_dense": V3 | {"first_k_dense_replace": 2},
    "v3_all_moe": V3 | {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "v3_no_q_lora": V3 | {"q_lora_rank": None, "attention_bias": True},
    "v3_yarn": V3 | {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    "v3_linear": V3 | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}},
    "v3_dynamic_short": V3 | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
    "v3_dynamic_long": V3 | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
                             "max_position_embeddings": 5},
    "v3_tied": V3 | {"tie_word_embeddings": True},
    "v3_other_eps": V3 | {"rms_norm_eps": 0.1},
    "v3_wide_values": V3 | {"v_head_dim": 14},
    "v3_no_shared_experts": V3 | {"n_shared_experts": 0},
    "v3_top_1": V3 | {"num_experts_per_tok": 1, "norm_topk_prob": False},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(meshes, name):
    check(CASES[name], meshes)


@st.composite
def architectures(draw) -> dict:
    """Any mix of the options above."""
    fields = dict(draw(st.sampled_from([V2, V3])))
    groups = draw(st.sampled_from([1, 2, 3, 6]))
    kept = draw(st.integers(1, groups))
    fields |= {
        "n_group": groups, "topk_group": kept, "num_experts_per_tok": draw(st.integers(1, 12 // groups * kept)),
        "q_lora_rank": draw(st.sampled_from([None, 6])), "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, 2)), "routed_scaling_factor": draw(st.sampled_from([1.0, 1.7])),
        "tie_word_embeddings": draw(st.booleans()), "attention_bias": draw(st.booleans()),
        "v_head_dim": draw(st.sampled_from([4, 14])), "kv_lora_rank": draw(st.sampled_from([6, 24])),
        "rope_parameters": draw(st.sampled_from([None, *({"rope_theta": 1e3} | scaling for scaling in SCALINGS)])),
        "max_position_embeddings": draw(st.sampled_from([5, 64])),
    }
    if "topk_method" in fields:
        fields["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    else:
        fields["norm_topk_prob"] = fields["num_experts_per_tok"] > 1 and draw(st.booleans())
    return fields


@settings(max_examples=32, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=architectures())
def test_any_architecture(meshes, fields):
    check(fields, meshes)
