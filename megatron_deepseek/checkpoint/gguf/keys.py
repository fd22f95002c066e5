"""The keys of a GGUF file: what llama.cpp must know of a model beside its tensors.

Names and types of the keys are those of gguf.GGUFWriter, which is told each by a function of its own.
"""

from collections.abc import Mapping
from typing import Any

from gguf import (
    GGML_QUANT_VERSION,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    TokenType,
)

from megatron_deepseek.checkpoint.gguf.architectures import chooses_by_groups
from megatron_deepseek.checkpoint.gguf.vocabulary import Vocabulary
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.fields import RopeScaling

_FILE_TYPES = {GGMLQuantizationType.F32: LlamaFileType.ALL_F32, GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
               GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
               GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0}
_GATES = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}


def add_general(writer: GGUFWriter, name: str, size: str, kind: GGMLQuantizationType, generation: Mapping[str, Any]
                ) -> None:
    """Add the model's `name`, its size in words, the type of its matrices, and how to sample from it."""
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(size)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, add in (("temperature", writer.add_sampling_temp), ("top_k", writer.add_sampling_top_k),
                     ("top_p", writer.add_sampling_top_p)):
        if generation.get(key) is not None:
            add(generation[key])


def add_architecture(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add the sizes of a model, its attention, its rotary embedding and its experts."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_attention(writer, config)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        _add_rope_scaling(writer, config.rope_scaling)
    if config.kv_lora_rank or config.n_routed_experts:
        _add_experts(writer, config)


def _add_attention(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add head counts and sizes. MLA is attention with one head of keys, the latent, and its real sizes beside that."""
    writer.add_head_count(config.num_attention_heads)
    if not config.kv_lora_rank:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        return
    writer.add_head_count_kv(1)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)


def _add_rope_scaling(writer: GGUFWriter, scaling: RopeScaling) -> None:
    """Add what stretches the rotary embedding; Llama 3's way is a tensor (tensors.py)."""
    if scaling.kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        if scaling.mscale_all_dim:
            writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)


def _add_experts(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add the experts and their router; of a dense MLA, which llama.cpp has too, that every layer is dense."""
    dense = config.first_k_dense_replace if config.n_routed_experts else config.num_hidden_layers
    writer.add_leading_dense_block_count(dense)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size or config.intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    if not config.n_routed_experts:
        return
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_gating_func(_GATES[config.scoring_func])
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    if chooses_by_groups(config):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, vocab_size: int) -> None:
    """Add the tokenizer, with entries that nothing uses up to `vocab_size`."""
    unused = range(len(vocabulary.tokens), vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list([*vocabulary.tokens, *(f"[PAD{identity}]" for identity in unused)])
    writer.add_token_types([*vocabulary.types, *(TokenType.UNUSED for _ in unused)])
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_pad_token_id(vocabulary.pad)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
