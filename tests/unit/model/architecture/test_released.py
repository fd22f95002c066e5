"""The presets beside V2 and V3: the released config.json, the published counts, and the way out as it came."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from released_configs import RELEASED
from small_checkpoints import all_tensors, assert_identical, convert, random_weights, write_hf

from megatron_deepseek.checkpoint.convert.assets import Assets, fields_of
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.families import FAMILIES
from megatron_deepseek.model.architecture.matching import differences
from megatron_deepseek.model.architecture.presets import PRESETS, V3, load_config
from megatron_deepseek.model.architecture.refused import refused_types


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_file_is_the_preset_and_goes_out_as_it_came(name):
    """Every key, also those without meaning here: windows that are off, code to be loaded, versions."""
    released = RELEASED[name]
    config = ModelConfig.from_hf_dict(released)
    assert config == load_config(name)
    assert fields_of(config, Assets(fields=released)) == released
    written = config.to_hf_dict()
    assert ModelConfig.from_hf_dict(written) == config
    assert (written["model_type"], written["architectures"]) == (released["model_type"], released["architectures"])


def test_every_preset_of_another_release_is_checked():
    assert {preset.name for preset in PRESETS} - RELEASED.keys() == {"tiny", "deepseek-v2-lite", "deepseek-v2"}


def grouped(f: dict) -> int:
    """Weights of grouped-query attention: q and o of all heads, k and v of few; Qwen2 has biases of q, k and v."""
    size = f.get("head_dim") or f["hidden_size"] // f["num_attention_heads"]
    q, kv = f["num_attention_heads"] * size, f["num_key_value_heads"] * size
    return 2 * f["hidden_size"] * (q + kv) + (q + 2 * kv if f["model_type"] == "qwen2" else 0)


def latent(f: dict) -> int:
    """Weights of latent attention, with its norms of latents."""
    heads, hidden, rank = f["num_attention_heads"], f["hidden_size"], f["q_lora_rank"]
    query = heads * (f["qk_nope_head_dim"] + f["qk_rope_head_dim"])
    up = heads * (f["qk_nope_head_dim"] + f["v_head_dim"]) * f["kv_lora_rank"]
    down = hidden * (f["kv_lora_rank"] + f["qk_rope_head_dim"]) + f["kv_lora_rank"]
    return (hidden * query if rank is None else hidden * rank + rank + rank * query) + up + down + heads * f[
        "v_head_dim"] * hidden


def by_hand(f: dict, experts: int | None = None) -> int:
    """The parameters that the keys of a released file give; with `experts` that many of each layer's routed ones."""
    hidden, layers, dense = f["hidden_size"], f["num_hidden_layers"], f.get("first_k_dense_replace", 0)
    attention = (latent if "kv_lora_rank" in f else grouped)(f)
    total = 2 * f["vocab_size"] * hidden + hidden + layers * (attention + 2 * hidden)
    if "n_routed_experts" not in f:
        return total + layers * 3 * hidden * f["intermediate_size"]
    counted = (f["n_routed_experts"] if experts is None else experts) + f["n_shared_experts"]
    routed = hidden * f["n_routed_experts"] + counted * 3 * hidden * f["moe_intermediate_size"]
    return total + dense * 3 * hidden * f["intermediate_size"] + (layers - dense) * routed


@pytest.mark.parametrize("name", RELEASED)
def test_counts_to_the_unit(name):
    """The active ones too: all but the routed experts that a token does not choose, and the embedding, a look-up."""
    released, config = RELEASED[name], load_config(name)
    assert config.main_parameters() == by_hand(released)
    active = by_hand(released, released.get("num_experts_per_tok"))
    assert config.num_active_parameters() == active - released["vocab_size"] * released["hidden_size"]


# What the models' cards state, in billions, to the digits that they give; they count the embedding as active.
@pytest.mark.parametrize("name, total, active", [
    ("deepseek-r1-distill-qwen-1.5b", "1.78", None), ("deepseek-r1-distill-qwen-7b", "7.62", None),
    ("deepseek-r1-distill-qwen-14b", "14.8", None), ("deepseek-r1-distill-qwen-32b", "32.8", None),
    ("deepseek-r1-distill-llama-8b", "8.03", None), ("deepseek-r1-distill-llama-70b", "70.6", None),
    ("deepseek-llm-67b", "67", None), ("deepseek-moe-16b", "16.4", "2.8"), ("gigachat3-10b-a1.8b", None, "1.8")])
def test_counts_that_the_publishers_state(name, total, active):
    config = load_config(name)
    looked_up = config.vocab_size * config.hidden_size
    for stated, count in ((total, config.main_parameters()), (active, config.num_active_parameters() + looked_up)):
        assert stated is None or f"{count / 1e9:.{len(stated.partition('.')[2])}f}" == stated


def test_counts_of_kimi_k2():
    """"1T" with 32B active on the card, which rounds more: 1026B and 32.9B with the embedding."""
    config = load_config("kimi-k2")
    looked_up = config.vocab_size * config.hidden_size
    assert config.main_parameters() / 1e12 == pytest.approx(1, rel=0.03)
    assert (config.num_active_parameters() + looked_up) / 1e9 == pytest.approx(32, rel=0.03)


def test_counts_of_moonlight_s_card():
    """15.29B, of which 2.24B active, neither with the embedding nor the head in the first."""
    config = load_config("moonlight-16b-a3b")
    matrix = config.vocab_size * config.hidden_size
    assert (config.main_parameters() - 2 * matrix) / 1e9 == pytest.approx(15.29, abs=0.005)
    assert (config.num_active_parameters() - matrix) / 1e9 == pytest.approx(2.24, abs=0.005)


@pytest.mark.parametrize("name", ["deepseek-r1-distill-qwen-1.5b", "deepseek-r1-distill-llama-8b", "moonlight-16b-a3b",
                                  "gigachat3-10b-a1.8b", "kimi-k2"])
def test_counts_are_those_of_transformers(name):
    """Models on the meta device, made of the released keys. GigaChat3's MTP modules have no class there, and kimi_k2 is
    a deepseek_v3; the router's bias is no parameter.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fields = {key: value for key, value in RELEASED[name].items() if key not in ("auto_map", "quantization_config")}
    kind = fields.pop("model_type").replace("kimi_k2", "deepseek_v3")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    assert load_config(name).main_parameters() == sum(tensor.numel() for tensor in theirs.parameters())


SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_V3 = SMALL | {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
                    "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize("name, changes", [
    ("kimi-k2", SMALL_V3 | {"q_lora_rank": 12}), ("gigachat3-10b-a1.8b", SMALL_V3 | {"head_dim": 4, "qk_head_dim": 10}),
    ("deepseek-moe-16b", SMALL | {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}),
    ("deepseek-r1-distill-qwen-7b", SMALL), ("deepseek-r1-distill-llama-70b", SMALL | {"head_dim": 8}),
    ("deepseek-llm-7b", SMALL | {"num_key_value_heads": 4})])
def test_a_native_checkpoint_gives_back_what_came(tmp_path, name, changes):
    """The released file, made small: tensors bit for bit, config.json key by key, in its own model_type and class."""
    fields = {key: value for key, value in (RELEASED[name] | changes).items() if key != "quantization_config"}
    config = ModelConfig.from_hf_dict(fields)
    torch = pytest.importorskip("torch")
    weights = random_weights(config, torch.bfloat16)
    hf = write_hf(tmp_path / "hf", weights, fields)
    assert convert("hf", "native", hf, tmp_path / "native") == 0
    native = json.loads((tmp_path / "native" / "iter_0000000" / "config.json").read_text())
    assert (native["model_type"], ModelConfig.from_hf_dict(native)) == (fields["model_type"], config)
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back") == 0
    assert_identical(all_tensors(tmp_path / "back"), weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == fields


def test_another_name_is_no_other_model():
    """A checkpoint of one goes on under the other. A model that is no longer of the form loses the name."""
    named = replace(V3, released_as="kimi_k2")
    assert differences(named, V3) == [] and named.to_hf_dict()["model_type"] == "kimi_k2"
    assert replace(named, topk_method="greedy", scoring_func="softmax").model_type == "deepseek_v2"
    assert ModelConfig.from_hf_dict(V3.to_hf_dict() | {"model_type": "kimi_k2"}) == named


@pytest.mark.parametrize("alias, preset", [
    ("moonshotai/Kimi-K2-Instruct", "kimi-k2"), ("ai-sage/GigaChat3-10B-A1.8B", "gigachat3-10b-a1.8b"),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "deepseek-r1-distill-qwen-32b"),
    ("DeepSeek-R1-Distill-Llama-8B", "deepseek-r1-distill-llama-8b"),
    ("deepseek-ai/deepseek-moe-16b-chat", "deepseek-moe-16b"), ("deepseek-ai/DeepSeek-V3.1", "deepseek-v3")])
def test_names_on_hugging_face(alias, preset):
    assert load_config(alias) is load_config(preset)


def test_the_page_of_models_names_them_all():
    """Every family, every refused type, every preset that is no size of another's row."""
    page = (Path(__file__).parents[4] / "docs" / "models.md").read_text()
    named = set(re.findall(r"`([^`]*)`", page))
    assert {family.model_type for family in FAMILIES} | set(refused_types()) <= named
    sizes = {f"deepseek-r1-distill-qwen-{size}" for size in ("7b", "14b", "32b")}
    assert {preset.name for preset in PRESETS} - sizes <= named
