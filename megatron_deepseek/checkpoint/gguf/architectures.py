"""The architectures of llama.cpp by family, and what of a model llama.cpp would compute otherwise.

Read off llama.cpp's sources (src/models/deepseek2.cpp, deepseek.cpp; build_moe_ffn of src/llama-graph.cpp), and tried
with the wheel of xllamacpp that tests/engines names.
"""

from collections.abc import Callable

from gguf import MODEL_ARCH

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.families import family_of

ARCHITECTURES = {"deepseek_v2": MODEL_ARCH.DEEPSEEK2, "deepseek_v3": MODEL_ARCH.DEEPSEEK2,
                 "deepseek": MODEL_ARCH.DEEPSEEK, "llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2,
                 "qwen3": MODEL_ARCH.QWEN3}
_LAYERS_WITHOUT_Q_RANK = (26, 27)
_LAYERS_WITHOUT_Q_RANK_BY_VOCABULARY = (48, 128256)


def architecture_of(config: ModelConfig) -> MODEL_ARCH:
    """Return llama.cpp's architecture of a model."""
    return ARCHITECTURES[family_of(config).model_type]


def check_supported(config: ModelConfig) -> None:
    """Raise ValueError, with the reason, for a model that llama.cpp would refuse or compute otherwise."""
    for differs, reason in _LATENT if config.kv_lora_rank else _GROUPED:
        if differs(config):
            raise ValueError(f"--to gguf: {reason.format(config=config, rope=config.rope_scaling)}")


def chooses_by_groups(config: ModelConfig) -> bool:
    """Return whether a token reaches the experts of some groups only."""
    return config.topk_method != "greedy" and config.topk_group < config.n_group


def _is_lite(config: ModelConfig) -> bool:
    """Return whether llama.cpp expects queries without a rank: it tells by the number of layers."""
    return (config.num_hidden_layers in _LAYERS_WITHOUT_Q_RANK
            or (config.num_hidden_layers, config.vocab_size) == _LAYERS_WITHOUT_Q_RANK_BY_VOCABULARY)


def _scales_rope(config: ModelConfig, *kinds: str) -> bool:
    return config.rope_scaling is not None and config.rope_scaling.kind in kinds


Difference = tuple[Callable[[ModelConfig], bool], str]
_COMMON: tuple[Difference, ...] = (
    (lambda c: c.n_routed_experts > 0 and c.moe_layer_freq != 1,
     "moe_layer_freq {config.moe_layer_freq}, and llama.cpp has experts in every layer after the dense ones"),
    (lambda c: c.reward_head, "a reward model, which llama.cpp does not score with"),
    (lambda c: c.attention_bias, "attention_bias, whose biases are not written here"),
    (lambda c: _scales_rope(c, "dynamic"), "rope_scaling of type dynamic, which llama.cpp has not"),
)
_LATENT: tuple[Difference, ...] = (
    *_COMMON,
    (lambda c: (c.q_lora_rank is None) != _is_lite(c),
     "q_lora_rank {config.q_lora_rank} with {config.num_hidden_layers} layers: llama.cpp tells by 26 or 27 layers, or "
     "by 48 with 128256 tokens, that queries have no rank, and by any other number that they have one"),
    (lambda c: chooses_by_groups(c) and c.topk_method == "group_limited_greedy",
     "topk_method group_limited_greedy with topk_group {config.topk_group} of {config.n_group}: it rates a group of "
     "experts by its best, llama.cpp by its best two"),
    (lambda c: _scales_rope(c, "linear"), "rope_scaling of type linear, with which llama.cpp scales MLA otherwise"),
    (lambda c: _scales_rope(c, "yarn") and c.rope_scaling.mscale != c.rope_scaling.mscale_all_dim,
     "rope_scaling with mscale {rope.mscale} and mscale_all_dim {rope.mscale_all_dim}: llama.cpp takes them for equal"),
)
_GROUPED: tuple[Difference, ...] = (
    *_COMMON,
    (lambda c: c.sliding_window is not None, "sliding_window {config.sliding_window}, which llama.cpp ignores here"),
    (lambda c: c.partial_rotary_factor != 1, "partial_rotary_factor {config.partial_rotary_factor}, which llama.cpp "
     "has not in models of this kind"),
    (lambda c: c.n_routed_experts > 0 and (c.norm_topk_prob or c.scoring_func != "softmax"),
     "norm_topk_prob {config.norm_topk_prob} and scoring_func {config.scoring_func}: llama.cpp's deepseek takes the "
     "softmax's scores as they are"),
    (lambda c: _scales_rope(c, "yarn") and (c.rope_scaling.attention_factor is not None or (
        c.rope_scaling.mscale, c.rope_scaling.mscale_all_dim) != (1.0, 0.0)),
     "rope_scaling of type yarn with an attention_factor or mscales, which llama.cpp has not in models of this kind"),
    (lambda c: _scales_rope(c, "llama3") and family_of(c).model_type != "llama",
     "rope_scaling of type llama3, which llama.cpp has in Llama's models alone"),
)
