"""config.json of the grouped-query families: what is read, what is written, and what is refused by name."""

from dataclasses import replace

import pytest
from small_models import LLAMA_SMALL, V3_SMALL

from megatron_deepseek.arguments import parse
from megatron_deepseek.model.architecture import hf_config, hf_rope
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling
from megatron_deepseek.model.architecture.matching import differences

EXPERTS = {"moe_intermediate_size": 12, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
           "first_k_dense_replace": 1}
FAMILIES = {
    "llama": LLAMA_SMALL, "qwen2": replace(LLAMA_SMALL, qkv_bias=True), "qwen3": replace(LLAMA_SMALL, qk_norm=True),
    "deepseek": replace(LLAMA_SMALL, num_key_value_heads=4, **EXPERTS),
}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads")
YARN = RopeScaling("yarn", 4.0, 16)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("changes", [
    {}, {"head_dim": 6}, {"num_nextn_predict_layers": 2}, {"partial_rotary_factor": 0.5}, {"rope_scaling": YARN},
    {"rope_scaling": replace(YARN, attention_factor=1.3)},
    {"rope_scaling": RopeScaling("llama3", 8.0, 32, low_freq_factor=2.0)},
    {"rope_scaling": RopeScaling("dynamic", 4.0, 4096)}, {"tie_word_embeddings": True, "bos_token_id": 3}], ids=str)
def test_round_trip(model_type, changes):
    """In the released dialect, and in transformers 5's of RoPE."""
    model = replace(FAMILIES[model_type], **changes)
    fields = model.to_hf_dict()
    assert fields["model_type"] == model_type and ModelConfig.from_hf_dict(fields) == model
    newer = {name: value for name, value in fields.items() if "rope" not in name and "partial" not in name}
    newer |= hf_rope.write_rope(model, {"rope_parameters": {}})
    assert "rope_scaling" not in newer and ModelConfig.from_hf_dict(newer) == model


@pytest.mark.parametrize("name, model_type", [("LlamaConfig", "llama"), ("Qwen2Config", "qwen2"),
                                              ("Qwen3Config", "qwen3")])
def test_missing_keys_are_transformers_defaults(name, model_type):
    """Read from what is needed alone, and compared with its class; and its own file is read as it is."""
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, name)
    theirs = config_class(num_key_value_heads=8).to_dict()
    model = ModelConfig.from_hf_dict({key: theirs[key] for key in ("model_type", *NEEDED)})
    assert model == ModelConfig.from_hf_dict(theirs) and model.model_type == model_type
    shared = {key: value for key, value in vars(model).items() if key in theirs and key not in (
        "num_nextn_predict_layers", "layer_types")}
    assert shared == {key: theirs[key] for key in shared} and len(shared) >= 12
    ours = {key: value for key, value in model.to_hf_dict().items() if key not in ("architectures", "model_type")}
    assert ModelConfig.from_hf_dict(config_class(**ours).to_dict()) == model


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", NEEDED)
def test_what_an_architecture_cannot_do_without(model_type, key):
    fields = FAMILIES[model_type].to_hf_dict()
    del fields[key]
    with pytest.raises(ValueError, match=rf"^{key} is missing"):
        ModelConfig.from_hf_dict(fields)


def test_heads_that_the_file_leaves_open():
    """As every class of transformers has them: as many of keys as of queries, and together as wide as the states."""
    fields = FAMILIES["llama"].to_hf_dict() | {"num_key_value_heads": None, "head_dim": None}
    model = ModelConfig.from_hf_dict(fields)
    assert (model.num_key_value_heads, model.head_dim) == (4, 4)
    with pytest.raises(ValueError, match="hidden_size 18 is not a multiple of num_attention_heads 4"):
        ModelConfig.from_hf_dict(fields | {"hidden_size": 18})


@pytest.mark.parametrize("model_type, changes, message", [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ("llama", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ("llama", {"kv_lora_rank": 8}, "kv_lora_rank 8 has no meaning in a model of model_type llama"),
    ("llama", {"n_routed_experts": 8}, "n_routed_experts 8 has no meaning in a model of model_type llama"),
    ("llama", {"num_local_experts": 8}, "n_routed_experts 8 has no meaning in a model of model_type llama"),
    ("llama", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
    ("llama", {"sliding_window": 4096}, "sliding_window 4096 is not supported"),
    ("llama", {"rope_interleave": True}, "rope_interleave True is not supported, only False"),
    ("llama", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
    ("qwen2", {"attention_bias": True}, "attention_bias True has no meaning in a model of model_type qwen2"),
    ("deepseek", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' has no meaning in a model of model_type deeps"),
    ("deepseek", {"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5 has no meaning .* where it is 1.0"),
    ("deepseek", {"n_group": 2}, "n_group 2 has no meaning"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes', which is no bool"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 2.5}, "sliding_window is 2.5, which is no int"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers is '1', which is no int"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types .* one entry for each of 2 layers"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "has sliding_attention, but use_sliding"),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "chunked"]}, "'chunked' is not one of"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "no low_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "low_freq_factor": 1.0}}, "low_freq_factor 1.0"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "attention_factor": 2.0}}, "attention_factor 2"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "'longrope' is not one of default, linear"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ("llama", {"head_dim": 5}, "5 rotary dimensions"),
    ("llama", {"head_dim": "4"}, "head_dim is '4', which is no int"),
    ("llama", {"partial_rotary_factor": 0.0}, "partial_rotary_factor is 0.0; it must be above 0"),
    ("llama", {"num_key_value_head": 2}, "num_key_value_head is unknown; did you mean num_key_value_heads?"),
])
def test_refused(model_type, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf_dict(FAMILIES[model_type].to_hf_dict() | changes)


def test_a_released_file_says_all_that_is_asked():
    """What follows from other numbers or is of other families is not missed; a window that is not on changes nothing.
    """
    for model_type, model in FAMILIES.items():
        assert hf_config.describe(model.to_hf_dict(), "x.json") == [], model_type
    window = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1}
    assert ModelConfig.from_hf_dict(FAMILIES["qwen2"].to_hf_dict() | window) == FAMILIES["qwen2"]


def test_mscales_count_together_only():
    """As transformers reads YaRN's, apart from latent attention: one of them alone says nothing."""
    for mscales, expected in (({"mscale": 0.7}, (1.0, 0.0)), ({"mscale_all_dim": 0.7}, (1.0, 0.0)),
                              ({"mscale": 0.7, "mscale_all_dim": 1.2}, (0.7, 1.2))):
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | mscales
        scaling = ModelConfig.from_hf_dict(FAMILIES["qwen2"].to_hf_dict() | {"rope_scaling": rope}).rope_scaling
        assert (scaling.mscale, scaling.mscale_all_dim) == expected


def test_windows():
    """Of the layers from max_window_layers on, or of those that layer_types names; an MTP module has none."""
    fields = FAMILIES["qwen2"].to_hf_dict() | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    model = ModelConfig.from_hf_dict(fields)
    assert [model.window_of(index) for index in range(3)] == [None, 5, None]
    model = ModelConfig.from_hf_dict(fields | {"layer_types": ["sliding_attention", "full_attention"]})
    assert [model.window_of(index) for index in range(3)] == [5, None, None]
    assert ModelConfig.from_hf_dict(fields | {"max_window_layers": 2}) == FAMILIES["qwen2"]
    assert differences(model, FAMILIES["qwen2"]) == [
        "sliding_window 5 there, None here", "layer_types ['sliding_attention', 'full_attention'] there, [] here"]


def test_what_a_family_does_not_write_is_no_difference():
    """A dense model may have been made of one with experts, whose fields then mean nothing."""
    left = replace(LLAMA_SMALL, first_k_dense_replace=1, n_group=4, topk_group=2)
    assert differences(left, LLAMA_SMALL) == [] == differences(LLAMA_SMALL, left)
    assert differences(FAMILIES["qwen2"], LLAMA_SMALL) == ["qkv_bias True there, False here"]
    assert differences(V3_SMALL, LLAMA_SMALL)[0] == "num_attention_heads 2 there, 4 here"


@pytest.mark.parametrize("base, changes, message", [
    (LLAMA_SMALL, {"v_head_dim": 4}, "v_head_dim 4 is of latent attention"),
    (LLAMA_SMALL, {"num_key_value_heads": None}, "num_key_value_heads is missing, which grouped-query attention has"),
    (LLAMA_SMALL, {"qkv_bias": True, "attention_bias": True}, "exclude each other"),
    (LLAMA_SMALL, {"sliding_window": 4}, "go together"),
    (LLAMA_SMALL, {"rope_scaling": replace(YARN, mscale=0.7)}, "takes both or neither"),
    (V3_SMALL, {"head_dim": 4}, "head_dim 4 is of grouped-query attention; kv_lora_rank 8 says"),
    (V3_SMALL, {"qk_norm": True}, "qk_norm True is of grouped-query attention"),
    (V3_SMALL, {"rope_scaling": replace(YARN, attention_factor=2.0)}, "is of grouped-query attention"),
    (V3_SMALL, {"v_head_dim": None}, "v_head_dim is missing, which latent attention has")])
def test_contradictions(base, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(base, **changes)


def test_a_mixture_of_no_family_is_not_written():
    with pytest.raises(ValueError, match="no family of models has grouped-query attention with n_routed_experts 8"):
        replace(FAMILIES["deepseek"], qk_norm=True).to_hf_dict()


BASE = "--model tiny --data-path corpus --train-iters 1 --seq-length 256 --global-batch-size 32 --group-query-attention"


def test_command_line():
    """A latent preset becomes a Llama, and what contradicts is named by its option."""
    model = parse([*BASE.split(), "--num-experts", "0", "--num-query-groups", "2"], 8).model
    assert model.model_type == "llama" and (model.num_key_value_heads, model.head_dim) == (2, 32)
    for options, message in (("--num-query-groups 3", "--num-query-groups 3"), ("", "routing of DeepSeekMoE"),
                             ("--num-experts 0 --tensor-model-parallel-size 4 --num-attention-heads 12 "
                              "--num-query-groups 6", "neither divides --num-query-groups 6"),
                             ("--kv-lora-rank 16", "--kv-lora-rank 16 is of latent attention")):
        with pytest.raises(ValueError, match=message):
            parse([*BASE.split(), *options.split()], 8)
