"""References of the families beside MLA: transformers' classes, and DeepSeekMoE-16B, for which it has none.

The latter is transformers' Llama with the mixture of experts of DeepSeek's own modeling_deepseek.py written out:
softmax over all experts, the best of them, their weights as they are or normalised, shared experts beside them.
"""

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
           "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


class Experts(nn.Module):
    """Stacked as ours are: gate and up of expert e are gate_up_proj[e]."""

    def __init__(self, experts: int, hidden: int, width: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_H: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = (self.gate_up_proj[expert] @ x_H).chunk(2)
        return self.down_proj[expert] @ (gate * gate.sigmoid() * up)


class MixtureOfExperts(nn.Module):
    def __init__(self, fields: dict, shared: nn.Module | None):
        super().__init__()
        self.top_k, self.normalised = fields["num_experts_per_tok"], fields["norm_topk_prob"]
        self.gate = nn.Linear(fields["hidden_size"], fields["n_routed_experts"], bias=False)
        self.experts = Experts(fields["n_routed_experts"], fields["hidden_size"], fields["moe_intermediate_size"])
        if shared is not None:
            self.shared_experts = shared

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x_BSH).softmax(-1).topk(self.top_k, -1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        rows = [sum(weight * self.experts(x_H, expert) for weight, expert in zip(weights_K, chosen_K.tolist()))
                for x_H, weights_K, chosen_K in zip(*(t.flatten(0, 1) for t in (x_BSH, weights, chosen)))]
        y_BSH = torch.stack(rows).view_as(x_BSH)
        return y_BSH + self.shared_experts(x_BSH) if hasattr(self, "shared_experts") else y_BSH


def deepseek_moe(fields: dict) -> LlamaForCausalLM:
    """DeepSeekMoE of these fields of config.json. It is a Llama, so that its own config says nothing of experts."""
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in fields.items() if key in LLAMA_KEYS}))
    for index, layer in enumerate(model.model.layers):
        if index >= fields["first_k_dense_replace"] and index % fields["moe_layer_freq"] == 0:
            shared, width = fields["n_shared_experts"], fields["moe_intermediate_size"]
            config = LlamaConfig(hidden_size=fields["hidden_size"], intermediate_size=width * (shared or 1),
                                 num_attention_heads=1)
            layer.mlp = MixtureOfExperts(fields, type(layer.mlp)(config) if shared else None)
    return model


LLAMA_KEYS = frozenset((
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "attention_bias", "rope_parameters", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attn_implementation"))
