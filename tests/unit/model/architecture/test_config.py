"""The architecture: Hugging Face's dialects, the presets and their parameter counts."""

import dataclasses
import json
import math
import re

import pytest

from megatron_deepseek.checkpoint.convert.names import native_places
from megatron_deepseek.model.architecture import hf_config, hf_rope
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling
from megatron_deepseek.model.architecture.families import FAMILIES, family_of
from megatron_deepseek.model.architecture.fields import FORWARD, GROUPED, RULES, WEIGHTS
from megatron_deepseek.model.architecture.matching import differences
from megatron_deepseek.model.architecture.parameters import BIAS
from megatron_deepseek.model.architecture.presets import (
    TINY,
    V2,
    V2_LITE,
    V3,
    config_file,
    describe_model,
    load_config,
    preset_names,
)
from megatron_deepseek.model.architecture.refused import refusal, refused_types

# By hand, from the released files of V2-Lite, V2, V3, R1 and V3.1: all of them say these.
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
          "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts")
NEEDED_WITH_EXPERTS = ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace",
                       "routed_scaling_factor", "norm_topk_prob")
YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0}


# Totals and active parameters in billions as the reports give them (facts of the three releases); 2 % covers rounding.
@pytest.mark.parametrize("model, total, active", [(V2_LITE, 15.7, 2.4), (V2, 236, 21), (V3, 671, 37)])
def test_parameter_counts_of_the_reports(model, total, active):
    assert model.main_parameters() / 1e9 == pytest.approx(total, rel=0.002)
    assert model.num_active_parameters() / 1e9 == pytest.approx(active, rel=0.025)


def test_mtp_module_of_v3():
    """README_WEIGHTS.md of the release: 11.5B parameters of its own, 1.5B active with the 0.9B of the head."""
    assert V3.mtp_parameters() / 1e9 == pytest.approx(11.5, rel=0.02)
    head = V3.vocab_size * V3.hidden_size
    assert (V3.mtp_parameters(active=True) + head) / 1e9 == pytest.approx(1.5, rel=0.10)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": 2},
                                     {"tie_word_embeddings": True}, {"first_k_dense_replace": 3}])
def test_parameter_counts_are_those_of_transformers(changes):
    """Exactly. Transformers has no attention bias on q_proj and kv_b_proj either; the router's bias is no parameter."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = dataclasses.replace(TINY, **changes)
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**model.to_hf_dict()))
    assert model.main_parameters() == sum(tensor.numel() for tensor in theirs.parameters())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 2},
                                     {"num_nextn_predict_layers": 0}, {"n_routed_experts": 0}])
def test_parameter_counts_are_those_of_the_saved_tensors(changes):
    """MTP modules among them; what they share with the model is there once."""
    model = dataclasses.replace(TINY, **changes)
    saved = {place.whole: place.whole_shape for place in native_places(model)}
    assert model.num_parameters() == sum(math.prod(shape) for name, shape in saved.items() if not name.endswith(BIAS))


def test_parameter_counts_in_words():
    assert TINY.describe_parameters() == "4,215,008 parameters (504,544 of MTP), 1,777,152 active for a token"
    assert dataclasses.replace(TINY, num_nextn_predict_layers=0).describe_parameters() == \
        "3,710,464 parameters, 1,777,152 active for a token"


@pytest.mark.parametrize("name", preset_names())
def test_round_trip(name, tmp_path):
    model = load_config(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.to_hf_dict()))
    assert ModelConfig.from_file(path) == ModelConfig.from_file(tmp_path) == load_config(str(path)) == model


@pytest.mark.parametrize("name", [name for name in preset_names() if load_config(name).model_type != "deepseek"])
def test_round_trip_through_transformers(name):
    """Their class reads our fields; what it writes, RoPE in its own dialect, is the same architecture again. There is
    none for DeepSeekMoE-16B, and kimi_k2 is a deepseek_v3 there.
    """
    transformers = pytest.importorskip("transformers")
    model = load_config(name)
    fields = dict(model.to_hf_dict())
    kind = transformers.AutoConfig.for_model(fields.pop("model_type").replace("kimi_k2", "deepseek_v3"), **fields)
    read = ModelConfig.from_hf_dict(kind.to_dict())
    assert dataclasses.replace(read, released_as=model.released_as) == model


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_other_rope_scaling_round_trips(kind):
    model = dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(kind, 8.0, 2048))
    assert ModelConfig.from_hf_dict(model.to_hf_dict()) == model


def test_both_dialects_of_rope():
    others = {name: value for name, value in V3.to_hf_dict().items() if not name.startswith("rope_")}
    released = others | {"rope_theta": 5000, "rope_scaling": {"type": "yarn", **YARN}}
    rewritten = others | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000, **YARN}}
    model = ModelConfig.from_hf_dict(released)
    assert model == ModelConfig.from_hf_dict(rewritten)
    assert model.rope_theta == 5000.0
    assert model.rope_scaling == RopeScaling("yarn", 40.0, 4096, 32.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["DeepseekV2Config", "DeepseekV3Config"])
def test_missing_fields_are_transformers_defaults(kind):
    """MTP modules and what transformers fixes in code (scores, method of V3) excepted."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, kind)(num_experts_per_tok=6).to_dict()
    needed = {name: theirs[name] for name in (*NEEDED, *NEEDED_WITH_EXPERTS, "n_group", "topk_group")}
    fields = dataclasses.asdict(ModelConfig.from_hf_dict(needed | {"model_type": theirs["model_type"]}))
    of_others = {name for name, rule in RULES.items() if rule.attention == GROUPED}
    shared = set(fields) & set(theirs) - {"num_nextn_predict_layers", *needed, *of_others}
    assert {name: fields[name] for name in shared} == {name: theirs[name] for name in shared}
    assert fields["num_nextn_predict_layers"] == 0 and len(shared) >= 8


@pytest.mark.parametrize("kind", ["DeepseekV2Config", "DeepseekV3Config"])
def test_files_of_transformers_load(kind, tmp_path):
    """What it leaves out, since it is a class's default, is no refusal: V3's method and scores, the balance loss."""
    transformers = pytest.importorskip("transformers")
    getattr(transformers, kind)(num_experts_per_tok=6).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"scoring_func", "moe_layer_freq", "seq_aux", "aux_loss_alpha"} & written.keys()
    model = ModelConfig.from_file(tmp_path)
    v3 = kind == "DeepseekV3Config"
    assert (model.topk_method, model.scoring_func) == (("noaux_tc", "sigmoid") if v3 else ("greedy", "softmax"))
    assert (model.hidden_size, model.num_experts_per_tok) == (written["hidden_size"], 6)


def test_null_experts_make_a_dense_model():
    """Whose file needs to say nothing else of experts."""
    fields = {name: V3.to_hf_dict()[name] for name in ("model_type", *NEEDED)} | {"n_routed_experts": None}
    model = ModelConfig.from_hf_dict(fields | {"n_shared_experts": None})
    assert (model.n_routed_experts, model.n_shared_experts, model.num_moe_layers) == (0, 0, 0)
    assert ModelConfig.from_hf_dict(fields).num_moe_layers == 0
    assert "topk_method" not in " ".join(hf_config.describe(fields, "config.json"))


def test_aliases_of_transformers():
    fields = V3.to_hf_dict()
    for name in ("num_nextn_predict_layers", "n_routed_experts"):
        del fields[name]
    model = ModelConfig.from_hf_dict(fields | {"num_mtp_layers": 2, "num_local_experts": 64})
    assert (model.num_nextn_predict_layers, model.n_routed_experts) == (2, 64)
    with pytest.raises(ValueError, match="num_mtp_layers 2 and num_nextn_predict_layers 1 are two names"):
        ModelConfig.from_hf_dict(V3.to_hf_dict() | {"num_mtp_layers": 2})


@pytest.mark.parametrize("name", [*NEEDED, *NEEDED_WITH_EXPERTS, "n_group", "topk_group"])
def test_what_an_architecture_cannot_do_without(name):
    """Hand-made list: each of them changes shapes, or the routing without changing a shape."""
    fields = V3.to_hf_dict()
    del fields[name]
    with pytest.raises(ValueError, match=rf"^{name} is missing"):
        ModelConfig.from_hf_dict(fields)


@pytest.mark.parametrize("wrong, meant", [
    ("hiden_size", "hidden_size"), ("num_hidden_layer", "num_hidden_layers"), ("vocabsize", "vocab_size"),
    ("n_routed_expert", "n_routed_experts"), ("num_experts_per_token", "num_experts_per_tok"),
    ("kv_lora_rnk", "kv_lora_rank"), ("moe_layers_freq", "moe_layer_freq"), ("aux_los_alpha", "aux_loss_alpha"),
    ("rope_scalling", "rope_scaling"), ("rope_tetha", "rope_theta"), ("scoring_function", "scoring_func"),
    ("tie_word_embedding", "tie_word_embeddings"), ("norm_eps", "rms_norm_eps"), ("mtp_layers", "num_mtp_layers"),
    ("quantisation_config", "quantization_config"), ("Hidden_Size", "hidden_size")])
def test_misspelt_keys_are_refused(wrong, meant):
    """Both instead of the right key, which need not be a required one, and beside it."""
    right = V3.to_hf_dict()
    for fields in (right, {name: value for name, value in right.items() if name != meant}):
        with pytest.raises(ValueError, match=rf"^{wrong} is unknown; did you mean {meant}\?$"):
            ModelConfig.from_hf_dict(fields | {wrong: 1})


@pytest.mark.parametrize("wrong, meant", [
    ("num_layers", "num_hidden_layers"), ("experts_per_token", "num_experts_per_tok"),
    ("n_shared", "n_shared_experts")])
def test_a_missing_key_is_likelier_meant_than_one_that_is_there(wrong, meant):
    fields = V3.to_hf_dict()
    fields[wrong] = fields.pop(meant)
    with pytest.raises(ValueError, match=rf"{wrong} is unknown; did you mean {meant}\?"):
        ModelConfig.from_hf_dict(fields)


@pytest.mark.parametrize("key", ["auto_map", "unsloth_version", "unsloth_fixed", "_attn_implementation", "task",
                                 "transformers.js_config", "max_length", "decoder_start_token_id", "use_sdpa",
                                 "boi_token_id", "mask_token_id"])
def test_other_unknown_keys_are_said_and_nothing_else(key):
    fields = V3.to_hf_dict() | {key: "x"}
    assert ModelConfig.from_hf_dict(fields) == V3
    assert hf_config.describe(fields, "x.json") == [f"x.json has {key}, without meaning here: kept for exports"]


def test_defaults_that_were_taken_are_listed():
    fields = V3.to_hf_dict()
    for name in ("aux_loss_alpha", "seq_aux", "rope_theta", "topk_method"):
        del fields[name]
    expected = 'aux_loss_alpha 0.0, seq_aux true, topk_method "noaux_tc", rope_theta 10000.0'
    assert hf_config.describe(fields, "x.json") == [f"x.json does not say, so these are taken: {expected}"]
    assert hf_config.describe(fields, "x.json", {"aux_loss_alpha", "seq_aux", "rope_theta", "topk_method"}) == []
    rope = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert "rope_theta" not in hf_config.describe(fields | rope, "x.json")[0]
    assert hf_config.describe(V3.to_hf_dict(), "x.json") == []


# transformers 5.23's RopeParameters, vLLM's get_rope for yarn and deepseek_yarn, the original YaRN's arguments.
@pytest.mark.parametrize("key, value, neutral", [
    ("attention_factor", 1.5, None), ("attn_factor", 0.8, 1.0), ("extrapolation_factor", 0.5, 1),
    ("truncate", False, True), ("partial_rotary_factor", 0.5, 1.0), ("short_factor", [1.0], None),
    ("long_factor", [2.0], None),
    ("low_freq_factor", 1.0, None), ("high_freq_factor", 4.0, None), ("mrope_section", [1, 1], None),
    ("llama_4_scaling_beta", 0.1, None), ("apply_yarn_scaling", False, True), ("short_mscale", 1.1, None),
    ("finetuned", False, True)])
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "default"])
def test_rope_keys_of_other_mathematics(kind, key, value, neutral):
    for name, type_key in (("rope_scaling", "type"), ("rope_parameters", "rope_type")):
        fields = {field: v for field, v in V3.to_hf_dict().items() if not field.startswith("rope_")}
        rope = {type_key: kind, "factor": 4.0}
        with pytest.raises(ValueError, match=rf"^{name} {key} .* is not supported"):
            ModelConfig.from_hf_dict(fields | {name: rope | {key: value}})
        for harmless in (neutral, None):
            given = fields | {name: rope | {key: harmless}}
            assert ModelConfig.from_hf_dict(given) == ModelConfig.from_hf_dict(fields | {name: rope})


@pytest.mark.parametrize("changes, message", [
    ({"betafast": 16}, "rope_scaling has betafast, which is unknown; did you mean beta_fast?"),
    ({"full_attention": {"factor": 2}}, "rope_scaling has full_attention with parameters of its own"),
    ({"type": "llama3"}, "rope_scaling type 'llama3' is not one of default, linear, dynamic, yarn"),
    ({"factor": "40"}, "rope_scaling factor is '40', which is no number"),
    ({"beta_slow": True}, "rope_scaling beta_slow is True, which is no number"),
    ({"original_max_position_embeddings": True}, "rope_scaling original_max_position_embeddings is True, which is no"),
    ({"type": None}, "rope_scaling has factor 40"),
])
def test_refused_rope(changes, message):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf_dict(V3.to_hf_dict() | {"rope_scaling": {"type": "yarn", **YARN} | changes})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("key, value, neutral", [  # vLLM's deepseek_v2.py reads the first; others have the rest
    ("llama_4_scaling", {"beta": 0.1}, None), ("swiglu_limit", 7.0, None), ("residual_multiplier", 0.5, 1.0),
    ("embedding_multiplier", 12.0, 1.0), ("logits_scaling", 8.0, 1.0), ("attention_chunk_size", 8192, None)])
def test_keys_of_other_mathematics(key, value, neutral):
    with pytest.raises(ValueError, match=f"^{key} .* is not supported, only {neutral}"):
        ModelConfig.from_hf_dict(V3.to_hf_dict() | {key: value})
    assert ModelConfig.from_hf_dict(V3.to_hf_dict() | {key: neutral}) == V3


def test_stretching_that_is_computed_with_the_length_needs_it():
    """The default of a class would be another rotation."""
    fields = V3.to_hf_dict()
    del fields["max_position_embeddings"]
    for rope in ({"type": "dynamic", "factor": 4.0}, {"type": "yarn", "factor": 4.0}):
        with pytest.raises(ValueError, match="max_position_embeddings is missing, which rope_scaling of type"):
            ModelConfig.from_hf_dict(fields | {"rope_scaling": rope})
    assert ModelConfig.from_hf_dict(fields | {"rope_scaling": {"type": "yarn", **YARN}}).rope_scaling is not None


def test_the_length_before_stretching_may_be_said_outside():
    """As transformers reads it, where it goes before the one inside; and so it goes out again."""
    fields = V3.to_hf_dict() | {"original_max_position_embeddings": 2048}
    model = ModelConfig.from_hf_dict(fields)
    assert model.rope_scaling == dataclasses.replace(V3.rope_scaling, original_max_position_embeddings=2048)
    other = dataclasses.replace(V3, rope_scaling=dataclasses.replace(V3.rope_scaling, factor=2.0))
    assert ModelConfig.from_hf_dict(fields | hf_rope.write_rope(other, fields)) == other


def test_unknown_rope_keys_are_said_and_kept():
    fields = V3.to_hf_dict()
    fields["rope_scaling"] |= {"note": "ours"}
    assert hf_config.describe(fields, "x") == ["x has rope_scaling.note, without meaning here: kept for exports"]
    longer = dataclasses.replace(V3, rope_scaling=dataclasses.replace(V3.rope_scaling, factor=80.0))
    assert hf_rope.write_rope(longer, fields)["rope_scaling"] == fields["rope_scaling"] | {"factor": 80.0}


def test_softmax_scale_of_every_kind_goes_out_again():
    """mscale_all_dim scales the softmax whatever the kind, here as in DeepSeek's own code and transformers."""
    model = dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 4.0, mscale_all_dim=0.7))
    assert ModelConfig.from_hf_dict(model.to_hf_dict()) == model


def test_gready_is_greedy():
    """The default of topk_method in the configuration_deepseek.py that the models are released with."""
    assert ModelConfig.from_hf_dict(V2_LITE.to_hf_dict() | {"topk_method": "gready"}) == V2_LITE


def test_fields_of_the_run_are_read_over():
    fields = {"ep_size": 8, "pretraining_tp": 4, "use_cache": False, "torch_dtype": "bfloat16", "auto_map": {},
              "quantization_config": {"quant_method": "fp8"}}
    assert ModelConfig.from_hf_dict(V3.to_hf_dict() | fields) == V3


@pytest.mark.parametrize("changes, fragments", [
    ({"model_type": "gemma"}, ["model_type 'gemma'", "deepseek_v2", "deepseek_v3", "qwen2"]),
    ({"model_type": "llama"}, ["kv_lora_rank 32 has no meaning", "model_type llama"]),
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
    ({"max_position_embeddings": -1}, ["max_position_embeddings is -1"]),
    ({"num_attention\x7fheads": 4}, [r"'num_attention\x7fheads' is unknown"]),
    ({"model_type": ["deepseek_v3"]}, ["model_type ['deepseek_v3'] is not one of"]),
    ({"hidden_size": 2**31}, ["hidden_size is 2147483648, more than 2147483647"]),
    ({"hidden_size": -2**40}, ["hidden_size is -1099511627776"]),
    ({"rms_norm_eps": 10**400}, ["rms_norm_eps is 1000"]),
    ({"num_hidden_layers": 10**6}, ["num_hidden_layers 1000000", "n_routed_experts 16"]),
    ({"rope_scaling": [1]}, ["rope_scaling is [1], not an object"]),
    ({"rope_scaling": {"type": "yarn", "factor": "2"}}, ["rope_scaling factor is '2'"]),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1.5}}, ["1.5, which is no"]),
    ({"rope_theta": "many"}, ["rope_theta is 'many'"]),
    ({"eos_token_id": ["a"]}, ["eos_token_id is 'a'"]),
])
def test_refused_configs(changes, fragments):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf_dict(TINY.to_hf_dict() | changes)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize("model_type", [
    "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "axk1", "kimi_k25", "mistral4", "youtu", "bailing_hybrid",
    "kimi_linear", "longcat_flash", "glm4_moe_lite"])
def test_models_near_to_v3_are_refused_with_the_reason(model_type):
    """As V3 they would train, and be another model. Each has a class in transformers, or is a release's type."""
    reason = refusal(model_type)
    assert reason.startswith(f"model_type '{model_type}' is not supported: ")
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        ModelConfig.from_hf_dict(V3.to_hf_dict() | {"model_type": model_type})


def test_refused_types_are_types():
    """A misspelt one would refuse nothing. The two that transformers does not know are multimodal releases'."""
    transformers = pytest.importorskip("transformers")
    known = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    assert set(refused_types()) - known == {"deepseek_vl_v2", "kimi_vl"}
    assert not set(refused_types()) & {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_unreadable_files_are_named(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="config.json"):
        ModelConfig.from_file(path)


@pytest.mark.parametrize("alias, preset", [
    ("deepseek-ai/DeepSeek-V3", "deepseek-v3"), ("DeepSeek-R1", "deepseek-v3"), ("deepseek-r1-zero", "deepseek-v3"),
    ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"), ("DeepSeek-V2", "deepseek-v2")])
def test_released_models_are_names_of_presets(alias, preset):
    assert load_config(alias) is load_config(preset)
    assert config_file(alias) is None and describe_model(alias) == []


def test_a_directory_goes_before_an_alias(tmp_path, monkeypatch):
    """As it lies where somebody downloaded it to, with numbers that may be others."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "deepseek-ai" / "DeepSeek-V3"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    assert load_config("deepseek-ai/DeepSeek-V3") == TINY
    assert config_file("deepseek-ai/DeepSeek-V3").is_file()


@pytest.mark.parametrize("wrong, meant", [
    ("deepseek-v33", "deepseek-v3"), ("deepseek-ai/DeepSeek-V2-Light", "deepseek-v2-lite"), ("tinny", "tiny")])
def test_misspelt_models_are_told_what_is_meant(wrong, meant):
    with pytest.raises(ValueError, match=rf"neither a preset \(tiny, .* did you mean {meant}( or .*)?\?$"):
        load_config(wrong)


@pytest.mark.parametrize("model", [TINY, V2, V2_LITE, V3])
def test_an_architecture_may_be_known_by_its_class(model):
    """`architectures` decides where there is no model_type; where there is one, that does."""
    fields = model.to_hf_dict()
    assert family_of(model).architectures[0] == fields["architectures"][0]
    del fields["model_type"]
    assert ModelConfig.from_hf_dict(fields) == model
    for without in ({"architectures": ["MistralForCausalLM"]}, {"architectures": None}, {"architectures": 3}):
        with pytest.raises(ValueError, match="model_type None is not one of deepseek_v2, deepseek_v3"):
            ModelConfig.from_hf_dict(fields | without)
    with pytest.raises(ValueError, match=r"model_type 'deepseekv3' is not one of .*; did you mean deepseek_v3\?"):
        ModelConfig.from_hf_dict(fields | {"model_type": "deepseekv3"})


def test_every_field_says_whether_a_checkpoint_must_match():
    """By hand: the rest decides how a model is trained, or what it is told of the tokenizer."""
    free = {"aux_loss_alpha", "seq_aux", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id"}
    forward = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rms_norm_eps", "max_position_embeddings",
               "sliding_window", "layer_types"}
    assert {name for name, rule in RULES.items() if rule.match is None} == free
    assert {name for name, rule in RULES.items() if rule.match == FORWARD} == forward
    assert {name for name, rule in RULES.items() if rule.match == WEIGHTS} == RULES.keys() - free - forward


def test_differences_of_what_must_match():
    """As config.json writes it: what a kind of scaling does not use is no difference; lengths are one if it does."""
    def told(one, other, *matches):
        return differences(dataclasses.replace(TINY, **one), dataclasses.replace(TINY, **other), *matches)

    linear, dynamic = RopeScaling("linear", 8.0), RopeScaling("dynamic", 8.0)
    assert told({}, {"aux_loss_alpha": 1.0, "initializer_range": 0.1, "max_position_embeddings": 8192}) == []
    assert told({"rope_scaling": linear}, {"rope_scaling": dataclasses.replace(linear, beta_fast=1.0)}) == []
    assert told({"rope_scaling": linear}, {"rope_scaling": dataclasses.replace(linear, factor=4.0)}) == [
        "rope_scaling factor 8.0 there, 4.0 here"]
    assert told({"rope_scaling": dynamic}, {"rope_scaling": dynamic, "max_position_embeddings": 8192}, FORWARD)[0] == (
        "max_position_embeddings 4096 there, 8192 here")
    assert told({"hidden_size": 256, "rms_norm_eps": 1e-5}, {}) == [
        "hidden_size 256 there, 128 here", "rms_norm_eps 1e-05 there, 1e-06 here"]
    assert told({"hidden_size": 256, "rms_norm_eps": 1e-5}, {}, WEIGHTS) == ["hidden_size 256 there, 128 here"]
