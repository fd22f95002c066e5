"""The architecture: Hugging Face's dialects, the presets and their parameter counts."""

import dataclasses
import json

import pytest

from megatron_deepseek.config import ModelConfig, RopeScaling
from megatron_deepseek.presets import TINY, V2, V2_LITE, V3, load_model, preset_names

YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0}


# Totals and active parameters in billions as the reports give them (facts of the three releases); 2 % covers rounding.
@pytest.mark.parametrize("model, total, active", [(V2_LITE, 15.7, 2.4), (V2, 236, 21), (V3, 671, 37)])
def test_parameter_counts_of_the_reports(model, total, active):
    assert model.num_parameters() / 1e9 == pytest.approx(total, rel=0.002)
    assert model.num_active_parameters() / 1e9 == pytest.approx(active, rel=0.025)


def test_mtp_module_of_v3():
    """README_WEIGHTS.md of the release: 11.5B parameters of its own, 1.5B active with the 0.9B of the head."""
    assert V3.mtp_parameters() / 1e9 == pytest.approx(11.5, rel=0.02)
    head = V3.vocab_size * V3.hidden_size
    assert (V3.mtp_parameters(active=True) + head) / 1e9 == pytest.approx(1.5, rel=0.10)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": 2},
                                     {"tie_word_embeddings": True}, {"first_k_dense_replace": 3}])
def test_parameter_counts_are_those_of_transformers(changes):
    """Exactly, the bias of the router included. Transformers has no attention bias on q_proj and kv_b_proj either."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = dataclasses.replace(TINY, **changes)
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**model.to_hf_dict()))
    tensors = list(theirs.parameters()) + [b for name, b in theirs.named_buffers() if "e_score" in name]
    assert model.num_parameters() == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("name", preset_names())
def test_round_trip(name, tmp_path):
    model = load_model(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.to_hf_dict()))
    assert ModelConfig.from_file(path) == ModelConfig.from_file(tmp_path) == load_model(str(path)) == model


@pytest.mark.parametrize("name", preset_names())
def test_round_trip_through_transformers(name):
    """Their class reads our fields; what it writes, RoPE in its own dialect, is the same architecture again."""
    transformers = pytest.importorskip("transformers")
    model = load_model(name)
    kind = transformers.DeepseekV3Config if model.model_type == "deepseek_v3" else transformers.DeepseekV2Config
    assert ModelConfig.from_hf_dict(kind(**model.to_hf_dict()).to_dict()) == model


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_other_rope_scaling_round_trips(kind):
    model = dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(kind, 8.0, 2048))
    assert ModelConfig.from_hf_dict(model.to_hf_dict()) == model


def test_both_dialects_of_rope():
    released = {"model_type": "deepseek_v3", "rope_theta": 5000, "rope_scaling": {"type": "yarn", **YARN}}
    rewritten = {"model_type": "deepseek_v3", "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000, **YARN}}
    model = ModelConfig.from_hf_dict(released)
    assert model == ModelConfig.from_hf_dict(rewritten)
    assert model.rope_theta == 5000.0
    assert model.rope_scaling == RopeScaling("yarn", 40.0, 4096, 32.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["DeepseekV2Config", "DeepseekV3Config"])
def test_missing_fields_are_transformers_defaults(kind):
    """MTP modules and what transformers fixes in code (scores, method of V3) excepted."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, kind)(num_experts_per_tok=6).to_dict()
    given = {"model_type": theirs["model_type"], "num_experts_per_tok": 6}
    fields = dataclasses.asdict(ModelConfig.from_hf_dict(given))
    shared = set(fields) & set(theirs) - {"num_nextn_predict_layers"}
    nulls = {"n_group": 1, "topk_group": 1}
    assert {name: fields[name] for name in shared} == {
        name: nulls.get(name) if theirs[name] is None else theirs[name] for name in shared}
    assert fields["num_nextn_predict_layers"] == 0 and len(shared) >= 20


def test_router_defaults_by_model_type():
    v3 = ModelConfig.from_hf_dict({"model_type": "deepseek_v3"})
    v2 = ModelConfig.from_hf_dict({"model_type": "deepseek_v2", "num_experts_per_tok": 6})
    assert (v3.topk_method, v3.scoring_func, v3.model_type) == ("noaux_tc", "sigmoid", "deepseek_v3")
    assert (v2.topk_method, v2.scoring_func, v2.model_type) == ("greedy", "softmax", "deepseek_v2")


def test_null_experts_make_a_dense_model():
    model = ModelConfig.from_hf_dict({"model_type": "deepseek_v3", "n_routed_experts": None, "n_shared_experts": None})
    assert (model.n_routed_experts, model.n_shared_experts, model.num_moe_layers) == (0, 0, 0)


def test_aliases_of_transformers():
    model = ModelConfig.from_hf_dict({"model_type": "deepseek_v3", "num_mtp_layers": 2, "num_local_experts": 64})
    assert (model.num_nextn_predict_layers, model.n_routed_experts) == (2, 64)


def test_fields_of_the_run_are_read_over():
    fields = {"ep_size": 8, "pretraining_tp": 4, "use_cache": False, "torch_dtype": "bfloat16", "auto_map": {},
              "quantization_config": {"quant_method": "fp8"}}
    assert ModelConfig.from_hf_dict(V3.to_hf_dict() | fields) == V3


@pytest.mark.parametrize("changes, fragments", [
    ({"model_type": "llama"}, ["model_type 'llama'", "deepseek_v2", "deepseek_v3"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'"]),
    ({"rope_interleave": False}, ["rope_interleave False"]),
    ({"num_key_value_heads": 2}, ["num_key_value_heads 2", "num_attention_heads 4"]),
    ({"hidden_size": "256"}, ["hidden_size is '256'"]),
    ({"hidden_size": True}, ["hidden_size is True"]),
    ({"hidden_size": 0}, ["hidden_size is 0"]),
    ({"n_routed_experts": -1}, ["n_routed_experts is -1"]),
    ({"rope_scaling": {"type": "yarn"}}, ["'yarn' has no factor"]),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, ["'longrope'"]),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.5}}, ["attention_factor 1.5"]),
    ({"num_experts_per_tok": 9}, ["num_experts_per_tok 9", "8 experts"]),
    ({"n_group": 5}, ["n_routed_experts 16", "n_group 5"]),
    ({"q_lora_rank": 0}, ["q_lora_rank is 0"]),
    ({"model_type": ["deepseek_v3"]}, ["model_type ['deepseek_v3'] is not one of"]),
    ({"hidden_size": 2**31}, ["hidden_size is 2147483648, more than 2147483647"]),
    ({"hidden_size": -2**40}, ["hidden_size is -1099511627776"]),
    ({"rms_norm_eps": 10**400}, ["rms_norm_eps is 1000"]),
    ({"num_hidden_layers": 10**6}, ["num_hidden_layers 1000000", "n_routed_experts 16"]),
    ({"rope_scaling": [1]}, ["rope_scaling holds a list of 1, not an object"]),
    ({"rope_scaling": {"type": "yarn", "factor": "2"}}, ['rope_scaling: "factor" is "2", not a number']),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1.5}}, ["is 1.5, not an int"]),
    ({"rope_theta": "many"}, ['"rope_theta" is "many", not a number']),
    ({"eos_token_id": ["a"]}, ["eos_token_id is 'a'"]),
])
def test_refused_configs(changes, fragments):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf_dict(TINY.to_hf_dict() | changes)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_unreadable_files_are_named(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="config.json"):
        ModelConfig.from_file(path)
