"""Names and shapes in megatron-core's `torch_dist` checkpoints of GPTModel (read off megatron-core 0.16.1's sources).

A torch_dist checkpoint is a DCP directory too, so only the names differ: gate and up projections are one `linear_fc1`
(gate first), experts are stacked in front, and with Transformer Engine a norm belongs to the linear layer after it.
Rows of heads and of the rotary part are in Hugging Face's order in both.
"""

from megatron_deepseek.checkpoint.convert.names import Place, hf_shapes
from megatron_deepseek.model.architecture.config import ModelConfig

# Hugging Face's name within a layer -> megatron-core's. A norm has two spellings: Transformer Engine's, and its own.
_ATTENTION = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attn.q_proj.weight": ("self_attention.linear_q_proj.weight",),
    "self_attn.q_a_proj.weight": ("self_attention.linear_q_down_proj.weight",),
    "self_attn.q_a_layernorm.weight": ("self_attention.linear_q_up_proj.layer_norm_weight",
                                       "self_attention.q_layernorm.weight"),
    "self_attn.q_b_proj.weight": ("self_attention.linear_q_up_proj.weight",),
    "self_attn.kv_a_proj_with_mqa.weight": ("self_attention.linear_kv_down_proj.weight",),
    "self_attn.kv_a_layernorm.weight": ("self_attention.linear_kv_up_proj.layer_norm_weight",
                                        "self_attention.kv_layernorm.weight"),
    "self_attn.kv_b_proj.weight": ("self_attention.linear_kv_up_proj.weight",),
    "self_attn.o_proj.weight": ("self_attention.linear_proj.weight",),
    "mlp.gate.weight": ("mlp.router.weight",),
    "mlp.gate.e_score_correction_bias": ("mlp.router.expert_bias",),
}
_TOP = {"model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight", "lm_head.weight": "output_layer.weight"}
PADDED = (_TOP["model.embed_tokens.weight"], _TOP["lm_head.weight"])  # their rows may be more than the vocabulary's
MTP_PREFIX = "mtp."
_MTP = {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
        "shared_head.norm.weight": "final_layernorm.weight"}


def megatron_places(config: ModelConfig, stored: frozenset[str] | None = None) -> list[Place]:
    """Where each tensor is; of a norm's spellings the one among the names `stored`, or Transformer Engine's."""
    if config.attention_bias:
        raise ValueError("attention_bias true has no counterpart in megatron-core's latent attention")
    return [_place(name, shape, config, stored or frozenset()) for name, shape in hf_shapes(config).items()]


def _place(name: str, shape: tuple[int, ...], config: ModelConfig, stored: frozenset[str]) -> Place:
    if name in _TOP:
        return _alone(name, shape, _TOP[name])
    _, _, number, inner = name.split(".", 3)
    index, depth = int(number), int(number) - config.num_hidden_layers
    if depth >= 0 and inner in _MTP:
        return _alone(name, shape, f"{MTP_PREFIX}layers.{depth}.{_MTP[inner]}")
    prefix = f"decoder.layers.{index}." if depth < 0 else f"{MTP_PREFIX}layers.{depth}.transformer_layer."
    if inner == "post_attention_layernorm.weight":
        spellings = ("pre_mlp_layernorm.weight",) if config.is_moe_layer(index) else (
            "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    elif inner in _ATTENTION:
        spellings = _ATTENTION[inner]
    else:
        return _mlp(name, shape, prefix, inner, config)
    found = [prefix + spelling for spelling in spellings if prefix + spelling in stored]
    return _alone(name, shape, found[0] if found else prefix + spellings[0])


def _alone(name: str, shape: tuple[int, ...], whole: str) -> Place:
    return Place(name, shape, whole, shape, (0,) * len(shape))


def _mlp(name: str, shape: tuple[int, ...], prefix: str, inner: str, config: ModelConfig) -> Place:
    """mlp., mlp.shared_experts. or mlp.experts.E. and a projection; gate and up are the halves of linear_fc1."""
    *path, projection, _ = inner.split(".")
    down = projection == "down_proj"
    layer = "linear_fc2.weight" if down else "linear_fc1.weight"
    row = shape[0] if projection == "up_proj" else 0
    whole_shape = shape if down else (2 * shape[0], shape[1])
    if path[1:2] != ["experts"]:
        return Place(name, shape, f"{prefix}{'.'.join(path)}.{layer}", whole_shape, (row, 0))
    return Place(name, shape, f"{prefix}mlp.experts.experts.{layer}", (config.n_routed_experts, *whole_shape),
                 (int(path[2]), row, 0))
