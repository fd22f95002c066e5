"""Models for other engines to serve: sizes that their kernels take, random weights of spread, a tokenizer beside them.

After a few steps of training a small model says one token again and again, and its two best logits tie in bf16. These
weights do neither: std 1.3 / sqrt(inputs), embedding 1, head 3 / sqrt(hidden), norms 1 +- 0.1, router biases 0.05.
No text ends: the end's logit is 0, and the likeliest token's about 9.
"""

import argparse
import inspect
import json
from pathlib import Path

import torch
from small_checkpoints import write_hf

from megatron_deepseek.checkpoint.convert.names import hf_shapes, mtp_copies
from megatron_deepseek.cli.train_tokenizer import save, train
from megatron_deepseek.data.tokenizer import BOS, EOD
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling
from megatron_deepseek.model.architecture.parameters import BIAS, EMBEDDING, HEAD

VOCABULARY, EOS = 512, 1
DAMPING = 0.1
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_EXPERTS = {"num_experts_per_tok": 4, "first_k_dense_replace": 1}
_TEXTS = {"vocab_size": VOCABULARY, "max_position_embeddings": 5120, "bos_token_id": 0, "eos_token_id": EOS}

# V3's form: queries of low rank, sigmoid scores limited to groups, one MTP module, YaRN. Head sizes are V3's own, which
# vLLM's MLA on CPU asks for.
V3_LIKE = ModelConfig(
    **_TEXTS, **_MLA, **_EXPERTS, hidden_size=256, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    q_lora_rank=192, moe_intermediate_size=128, n_routed_experts=16, n_shared_experts=1, n_group=4, topk_group=2,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
    num_nextn_predict_layers=1, rope_scaling=RopeScaling("yarn", 40.0, 128, mscale_all_dim=1.0))
# V2-Lite's form, with its 27 layers: by their number llama.cpp knows that there is no rank of queries.
V2_LITE_LIKE = ModelConfig(
    **_TEXTS, **_MLA, **_EXPERTS, hidden_size=128, intermediate_size=256, num_hidden_layers=27, num_attention_heads=2,
    moe_intermediate_size=64, n_routed_experts=8, n_shared_experts=2,
    rope_scaling=RopeScaling("yarn", 40.0, 128, mscale=0.707, mscale_all_dim=0.707))
_GROUPED = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e6}
DENSE = {
    "llama": ModelConfig(**_TEXTS, **_GROUPED, rope_scaling=RopeScaling(
        "llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0, mscale=1.0, mscale_all_dim=0.0)),
    "qwen2": ModelConfig(**_TEXTS, **_GROUPED, qkv_bias=True, tie_word_embeddings=True),
    "qwen3": ModelConfig(**_TEXTS, **(_GROUPED | {"head_dim": 64}), qk_norm=True),
}


def spread_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the weights under Hugging Face's names, in float32, with the MTP modules' copies."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in hf_shapes(config).items():
        normal = torch.randn(shape, generator=generator)
        if name.endswith(BIAS) or name.endswith(".bias"):
            weights[name] = 0.05 * normal
        elif len(shape) == 1:
            weights[name] = 1 + 0.1 * normal
        elif name == EMBEDDING:
            weights[name] = normal
        else:
            weights[name] = (3 if name == HEAD else 1.3) / shape[1] ** 0.5 * normal
    weights[EMBEDDING if config.tie_word_embeddings else HEAD][EOS] = 0
    return weights | {name: weights[original].clone() for name, original in mtp_copies(config).items()}


def calm_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return spread weights of which each layer changes less: bf16 and FP8 leave the likeliest tokens likeliest.

    The MTP module predicts as the model does, from the embedding of the token that was said: the first half of its
    eh_proj's inputs.
    """
    weights = spread_weights(config)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weight * DAMPING
        elif name.endswith("eh_proj.weight"):
            weights[name] = torch.eye(*weight.shape)
    return weights


def write_engine_model(directory: Path, config: ModelConfig, calm: bool = False) -> Path:
    """Write a Hugging Face directory with a tokenizer of V3's kind, trained on a source of the standard library."""
    weights = calm_weights(config) if calm else spread_weights(config)
    write_hf(directory, weights, config.to_hf_dict() | {"torch_dtype": "float32"}, shards=1)
    save(train([inspect.getsource(argparse)], VOCABULARY), directory / "tokenizer.json")
    fields = {"add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOD, "pad_token": EOD,
              "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory
