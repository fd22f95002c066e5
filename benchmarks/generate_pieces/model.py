"""A V3-like model with V3's head sizes, of random weights at which the likeliest token is never a tie."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_deepseek.checkpoint.convert.names import hf_shapes, mtp_copies
from megatron_deepseek.data.tokenizer import SPECIAL_TOKENS
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import BIAS

CONFIG = ModelConfig(
    vocab_size=32768, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8,
    q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    moe_intermediate_size=384, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1,
    n_group=4, topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=4096)


def spread(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights of a size at which each layer changes its input about as much as in a trained model."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith(BIAS):
        return 0.05 * noise
    if "embed_tokens" in name:
        return noise
    return noise * (3 if name == "lm_head.weight" else 1.3) / shape[-1] ** 0.5


def write(directory: Path, dtype: torch.dtype) -> Path:
    """Write the model as a Hugging Face directory, unless it is there."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = {name: spread(name, shape, generator).to(torch.float32 if name.endswith(BIAS) else dtype)
               for name, shape in hf_shapes(CONFIG).items()}
    weights |= {name: weights[original].clone() for name, original in mtp_copies(CONFIG).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]  # llama.cpp wants a merge
    tokenizer = Tokenizer(models.BPE(vocab={each: number for number, each in enumerate(letters)}, merges=[("t", "h")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]}))
    fields = CONFIG.to_hf_dict() | {"torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": len(letters),
                                    "eos_token_id": len(letters) + 1}
    (directory / "config.json").write_text(json.dumps(fields, indent=2))
    return directory
