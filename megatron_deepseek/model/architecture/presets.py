"""Architectures by name: the released models as their config.json has them, and a tiny one for a laptop.

What a released file says of training (`initializer_range` 0.02, `aux_loss_alpha` 0.001) is kept although the reports
trained with other values; the scripts in examples/ pass the reports' values as arguments.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture import hf_config, released
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.rope_scaling import RopeScaling
from megatron_deepseek.near_names import near_names

_V2_YARN = RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.707,
                       mscale_all_dim=0.707)
_V3_YARN = RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
_HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

TINY = ModelConfig(
    vocab_size=8192, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    moe_intermediate_size=64, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
    first_k_dense_replace=1, n_group=4, topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid",
    norm_topk_prob=True, routed_scaling_factor=2.5, aux_loss_alpha=1e-4, num_nextn_predict_layers=1,
    max_position_embeddings=4096, initializer_range=0.03)

V2_LITE = ModelConfig(
    **_HEADS, vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27,
    num_attention_heads=16, q_lora_rank=None, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax",
    aux_loss_alpha=0.001, max_position_embeddings=163840, rope_scaling=_V2_YARN,
    bos_token_id=100000, eos_token_id=100001)

V2 = ModelConfig(
    **_HEADS, vocab_size=102400, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60,
    num_attention_heads=128, q_lora_rank=1536, moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=2,
    num_experts_per_tok=6, first_k_dense_replace=1, n_group=8, topk_group=3, topk_method="group_limited_greedy",
    scoring_func="softmax", routed_scaling_factor=16.0, aux_loss_alpha=0.001, max_position_embeddings=163840,
    rope_scaling=_V2_YARN, bos_token_id=100000, eos_token_id=100001)

V3 = ModelConfig(
    **_HEADS, vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
    num_attention_heads=128, q_lora_rank=1536, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=8, first_k_dense_replace=3, n_group=8, topk_group=4, topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, aux_loss_alpha=0.001,
    num_nextn_predict_layers=1, max_position_embeddings=163840, rope_scaling=_V3_YARN, bos_token_id=0, eos_token_id=1)


@dataclass(frozen=True)
class Preset:
    """An architecture by its `name` and `aliases`: models on Hugging Face that have it, without their publisher.

    The name is itself such a model, in whatever case it is written.
    """

    name: str
    config: ModelConfig
    aliases: tuple[str, ...] = ()


PRESETS = (
    Preset("tiny", TINY),
    Preset("deepseek-v2-lite", V2_LITE, ("DeepSeek-V2-Lite-Chat",)),
    Preset("deepseek-v2", V2, ("DeepSeek-V2-Chat",)),
    Preset("deepseek-v3", V3, ("DeepSeek-V3-Base", "DeepSeek-V3-0324", "DeepSeek-R1", "DeepSeek-R1-Zero",
                               "DeepSeek-R1-0528", "DeepSeek-V3.1", "DeepSeek-V3.1-Base", "DeepSeek-V3.1-Terminus")),
    Preset("deepseek-r1-distill-qwen-1.5b", released.R1_DISTILL_QWEN_1_5B),
    Preset("deepseek-r1-distill-qwen-7b", released.R1_DISTILL_QWEN_7B),
    Preset("deepseek-r1-distill-qwen-14b", released.R1_DISTILL_QWEN_14B),
    Preset("deepseek-r1-distill-qwen-32b", released.R1_DISTILL_QWEN_32B),
    Preset("deepseek-r1-distill-llama-8b", released.R1_DISTILL_LLAMA_8B),
    Preset("deepseek-r1-distill-llama-70b", released.R1_DISTILL_LLAMA_70B),
    Preset("deepseek-llm-7b", released.DEEPSEEK_LLM_7B, ("deepseek-llm-7b-base", "deepseek-llm-7b-chat")),
    Preset("deepseek-llm-67b", released.DEEPSEEK_LLM_67B, ("deepseek-llm-67b-base", "deepseek-llm-67b-chat")),
    Preset("deepseek-moe-16b", released.DEEPSEEK_MOE_16B, ("deepseek-moe-16b-base", "deepseek-moe-16b-chat")),
    Preset("kimi-k2", released.KIMI_K2, ("Kimi-K2-Base", "Kimi-K2-Instruct")),
    Preset("moonlight-16b-a3b", released.MOONLIGHT_16B_A3B, ("Moonlight-16B-A3B-Instruct",)),
    Preset("gigachat3-10b-a1.8b", released.GIGACHAT3_10B_A1_8B,
           ("GigaChat3-10B-A1.8B-base", "GigaChat3-10B-A1.8B-bf16")),
)
_PUBLISHER = re.compile(r"^(deepseek-ai|moonshotai|ai-sage)/")


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, without aliases."""
    return tuple(preset.name for preset in PRESETS)


def load_config(name: str) -> ModelConfig:
    """Return the preset of that name or alias, or the architecture in a config.json file or a directory with one.

    Raise ValueError, with the names that may be meant, where there is neither.
    """
    preset = _find_preset(name)
    if preset is not None:
        return preset.config
    if not Path(name).exists():
        known = {alias.lower(): each.name for each in PRESETS for alias in (each.name, *each.aliases)}
        near = near_names(_PUBLISHER.sub("", name.lower()), known)
        meant = list(dict.fromkeys(known[each] for each in near))
        raise ValueError(f"{name!r} is neither a preset ({', '.join(preset_names())}) nor a config.json file"
                         + (f"; did you mean {' or '.join(meant)}?" if meant else ""))
    return ModelConfig.from_file(name)


def config_file(name: str) -> Path | None:
    """Return the config.json that --model `name` is read from, None for a preset."""
    if _find_preset(name) is not None:
        return None
    return Path(name) / "config.json" if Path(name).is_dir() else Path(name)


def describe_model(name: str, overridden: Collection[str] = ()) -> list[str]:
    """Return lines on what a config.json leaves out and what of it has no meaning here, none for a preset.

    `overridden`: fields that are not the file's in the end.
    """
    path = config_file(name)
    return [] if path is None else hf_config.describe(dict(read_object(path).fields), path, overridden)


def _find_preset(name: str) -> Preset | None:
    """Return the preset of that name, or, where no such file exists, of that alias; None if there is none."""
    for preset in PRESETS:
        if name == preset.name:
            return preset
    if Path(name).exists():
        return None
    alias = _PUBLISHER.sub("", name.lower())
    return next((preset for preset in PRESETS if alias in map(str.lower, (preset.name, *preset.aliases))), None)
