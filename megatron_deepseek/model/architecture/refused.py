"""Models near to DeepSeek's that this project does not train, by the model_type of their config.json, and why.

Most differ from V3 in one thing that config.json hardly shows: without these lines somebody would change the name of
the type, and train another model than the one that the weights are of. What is said of each was read off its class in
transformers 5.23; deepseek_vl_v2 and kimi_vl, which have none there, are as their releases say.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_INDEXER = "an indexer in each layer chooses the tokens that are attended to (DSA)"
_LINEAR = "most of its layers have linear attention"
_GROUPED_EXPERTS = "grouped-query attention with experts; only deepseek, of DeepSeekMoE-16B, is such a family here"
_TEXT_MODEL = ("text_config is its config.json, and its tensors are those whose names begin with language_model., "
               "without that beginning")
_REASONS: Mapping[str, str] = MappingProxyType({
    # DeepSeek's own
    "deepseek_v32": f"{_INDEXER}; V3.1 is the last that has V3's architecture",
    "deepseek_v4": "attention to compressed entries, hyper-connections and layers that route by a hash of the token",
    "deepseek_vl": "a vision tower beside the language model, which is a llama",
    "deepseek_vl_hybrid": "two vision towers beside the language model, which is a llama",
    "deepseek_vl_v2": "a vision tower beside the language model, which is a deepseek_v2 or a deepseek",
    "deepseek_ocr2": "a vision encoder beside the language model",
    # V3's block with a difference
    "axk1": "a further norm, post_mlp_layernorm, on what the experts of a layer give",
    "axk2": f"gates on attention's output, and {_INDEXER}",
    "glm4_moe_lite": "mlp_layer_types lists its layers with experts one by one, which is not read here",
    "glm_moe_dsa": f"{_INDEXER}",
    "kimi_k25": f"a vision tower beside the language model, which is a kimi_k2: {_TEXT_MODEL}",
    "kimi_vl": f"a vision tower beside the language model, which has Moonlight's form: {_TEXT_MODEL}",
    "minicpm3": "embeddings, residual stream and logits are scaled (scale_emb, scale_depth, dim_model_base)",
    "mistral4": "queries are scaled by their position (llama_4_scaling_beta), and groups of softmax scores limit the "
                "choice of experts",
    "mistral_large4": f"layers share keys and values, and {_INDEXER}",
    "youtu": "a dense form of V3's, whose file lacks the fields of experts and has an embedding_initializer_range",
    # other attention
    "bailing_hybrid": f"{_LINEAR}, the others MLA",
    "glm5_next": f"{_LINEAR}, the others MLA, with hyper-connections",
    "kimi_linear": f"{_LINEAR}, the others MLA",
    "longcat_flash": "two attentions in each layer, and experts that do nothing (zero_expert_num)",
    "qwen3_next": f"{_LINEAR}",
    # grouped-query attention beside llama, qwen2 and qwen3
    "dots1": _GROUPED_EXPERTS,
    "glm4_moe": _GROUPED_EXPERTS,
    "mixtral": _GROUPED_EXPERTS,
    "qwen2_moe": _GROUPED_EXPERTS,
    "qwen3_moe": _GROUPED_EXPERTS,
    "mistral": "a sliding window in all layers is what its type stands for; without one, its weights are a llama's",
})


def refusal(model_type: Any) -> str | None:
    """Return why a model of that type is not trained here, None for a type that nothing is known of."""
    reason = _REASONS.get(model_type) if isinstance(model_type, str) else None
    return None if reason is None else f"model_type {model_type!r} is not supported: {reason}"


def refused_types() -> tuple[str, ...]:
    """Return the names of the types, for the documentation."""
    return tuple(_REASONS)
