"""Names and shapes in megatron-core's `torch_dist` checkpoints of GPTModel (read off megatron-core 0.16.1's sources).

A torch_dist checkpoint is a DCP directory too, so only the names differ: gate and up projections are one `linear_fc1`
(gate first), experts are stacked in front, and with Transformer Engine a norm belongs to the linear layer after it.
Rows of heads and of the rotary part are in Hugging Face's order in both. Grouped-query attention has one `linear_qkv`:
for each head of keys the queries that share it, then that key's rows, then the value's.

Where all layers are dense, megatron-core takes them for alike and stores each of their tensors once, stacked over the
layers ("homogeneous" layers); otherwise every layer has tensors of its own.
"""

from dataclasses import replace

from megatron_deepseek.checkpoint.convert.names import Place
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.families import family_of
from megatron_deepseek.model.architecture.parameters import HfTensor, Parameter, hf_tensors

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
    "self_attn.q_norm.weight": ("self_attention.q_layernorm.weight",),
    "self_attn.k_norm.weight": ("self_attention.k_layernorm.weight",),
    "mlp.gate.weight": ("mlp.router.weight",),
    "mlp.gate.e_score_correction_bias": ("mlp.router.expert_bias",),
}
_NORM_BEFORE_QKV = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
_TOP = {"model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight", "lm_head.weight": "output_layer.weight"}
PADDED = (_TOP["model.embed_tokens.weight"], _TOP["lm_head.weight"])  # their rows may be more than the vocabulary's
MTP_PREFIX, _LAYERS = "mtp.", "decoder.layers."
_MTP = {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
        "shared_head.norm.weight": "final_layernorm.weight"}


def megatron_places(config: ModelConfig, stored: frozenset[str] | None = None) -> list[Place]:
    """Return where each tensor is; of a norm's spellings the one among the names `stored`, or Transformer Engine's.

    Raise ValueError for an architecture that megatron-core cannot have.
    """
    if config.reward_head:
        raise ValueError("a reward model, with a score in place of an output head, has no counterpart in megatron-core")
    if config.attention_bias and not config.grouped_query:
        raise ValueError("attention_bias true has no counterpart in megatron-core's latent attention")
    if config.attention_bias:
        raise ValueError(f"attention_bias true of {family_of(config).model_type} has no counterpart in megatron-core, "
                         "where a bias of o_proj comes with biases in the MLP")
    alike = not config.n_routed_experts if stored is None else any(
        name.startswith(_LAYERS) and not name.removeprefix(_LAYERS)[0].isdigit() for name in stored)
    places = []
    for row, tensor in hf_tensors(config):
        of_decoder = row.layer is not None and row.layer < config.num_hidden_layers
        stacked = alike and of_decoder
        prefix = _LAYERS if stacked else f"{_LAYERS}{row.layer}." if of_decoder else ""
        place = _place(row, tensor, config, stored or frozenset(), prefix)
        places.append(_stacked(place, row.layer, config.num_hidden_layers) if stacked else place)
    return places


def _stacked(place: Place, layer: int, layers: int) -> Place:
    return replace(place, whole_shape=(layers, *place.whole_shape), offset=(layer, *place.offset))


def _place(row: Parameter, tensor: HfTensor, config: ModelConfig, stored: frozenset[str], prefix: str) -> Place:
    """Return where a tensor is; `prefix` begins the names of its layer in the decoder, "" for other tensors."""
    if row.layer is None:
        return _alone(tensor, _TOP[tensor.name])
    inner, depth = tensor.name.split(".", 3)[3], row.layer - config.num_hidden_layers
    if depth >= 0 and inner in _MTP:
        return _alone(tensor, f"{MTP_PREFIX}layers.{depth}.{_MTP[inner]}")
    prefix = prefix or f"{MTP_PREFIX}layers.{depth}.transformer_layer."
    if config.grouped_query and inner.startswith(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")):
        return _within_qkv(tensor, config, prefix, *inner.split(".")[1:])
    if config.grouped_query and inner == "input_layernorm.weight":
        spellings = _NORM_BEFORE_QKV
    elif inner == "post_attention_layernorm.weight":
        spellings = ("pre_mlp_layernorm.weight",) if config.is_moe_layer(row.layer) else (
            "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    elif inner in _ATTENTION:
        spellings = _ATTENTION[inner]
    else:
        return _mlp(row, tensor, prefix, inner)
    found = [prefix + spelling for spelling in spellings if prefix + spelling in stored]
    return _alone(tensor, found[0] if found else prefix + spellings[0])


def _alone(tensor: HfTensor, whole: str) -> Place:
    return Place(tensor.name, tensor.shape, whole, tensor.shape, (0,) * len(tensor.shape))


def _within_qkv(tensor: HfTensor, config: ModelConfig, prefix: str, projection: str, kind: str) -> Place:
    """Return the place of q_proj, k_proj or v_proj (`kind`: weight or bias), in pieces of one head of keys each."""
    groups, size = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups * size
    step = queries + 2 * size
    run, before = {"q_proj": (queries, 0), "k_proj": (size, queries), "v_proj": (size, queries + size)}[projection]
    rest = tensor.shape[1:]
    return Place(tensor.name, tensor.shape, f"{prefix}self_attention.linear_qkv.{kind}", (groups * step, *rest),
                 (before, *(0 for _ in rest)), run, step)


def _mlp(row: Parameter, tensor: HfTensor, prefix: str, inner: str) -> Place:
    """Return the place of a projection of mlp., mlp.shared_experts. or mlp.experts.E.

    Experts are stacked as ours are; of the others gate and up are the halves of linear_fc1.
    """
    *path, projection, _ = inner.split(".")
    layer = "linear_fc2.weight" if projection == "down_proj" else "linear_fc1.weight"
    if row.stacked:
        return Place(tensor.name, tensor.shape, f"{prefix}mlp.experts.experts.{layer}", row.shape, tensor.offset)
    whole = f"{prefix}{'.'.join(path)}.{layer}"
    if projection == "down_proj":
        return _alone(tensor, whole)
    rows, columns = tensor.shape
    return Place(tensor.name, tensor.shape, whole, (2 * rows, columns), (rows * (projection == "up_proj"), 0))
