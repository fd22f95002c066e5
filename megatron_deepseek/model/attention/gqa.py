"""Grouped-query attention (arXiv 2305.13245): several heads of queries share one head of keys and values.

    q, k, v = W_q x + b_q, W_k x + b_k, W_v x + b_v      biases where the architecture has them
    q, k    = norm(q), norm(k)                           each head by itself, where the architecture has norms
    y       = W_o softmax(rope(q) rope(k)^T * scale) v + b_o

Multi-head attention is the case of as many heads of keys as of queries. Projections are sharded by heads. Where there
are fewer heads of keys and values than TP ranks, these have W_k and W_v whole, and each keeps the head that its queries
ask. Softmax attention itself is core.py's, which asks `ProjectedHeads` for q, k and v. Under context parallelism the
turned keys and the values are what travels between the ranks that share a sequence.

Shapes: B batch, S sequence, T any tokens, H hidden, N local heads of queries, G local heads of keys and values, D head
dimension.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import Partial

from megatron_deepseek.model.attention.core import Heads, make_core
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.positions import Positions
from megatron_deepseek.model.rotary import softmax_scale
from megatron_deepseek.ops.rope import apply_rope_to_halves
from megatron_deepseek.parallel.tensor import PieceLinear, RMSNorm, row_linear


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with Hugging Face's parameter names: llama, qwen2, qwen3, deepseek.

    `index` is the layer's, on which it depends whether its tokens see a sliding window.
    """

    def __init__(self, index: int, blueprint: Blueprint):
        super().__init__()
        config, tp, recipe = blueprint.config, blueprint.tp, blueprint.recipe
        self.tp, self.size = tp, config.head_dim
        self.core = make_core(blueprint, softmax_scale(config), config.head_dim, config.window_of(index))
        hidden, bias, gemm = config.hidden_size, config.attention_bias or config.qkv_bias, recipe.linear
        heads, of_keys = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = PieceLinear(hidden, heads * self.size, heads, tp, bias, gemm)
        self.k_proj = PieceLinear(hidden, of_keys * self.size, of_keys, tp, bias, gemm)
        self.v_proj = PieceLinear(hidden, of_keys * self.size, of_keys, tp, bias, gemm)
        self.o_proj = row_linear(heads * self.size, hidden, tp, config.attention_bias, recipe.attention_output)
        self.rope = apply_rope_to_halves
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.size, config.rms_norm_eps, tp, weight_grad=Partial())
                                        for _ in range(2))

    def forward(self, x_BSH: torch.Tensor, positions: Positions) -> torch.Tensor:
        keys_BS = positions.keys.own_BS
        with self.q_proj.gemm.shared(self.tp.enter(x_BSH)) as shared_BSH:
            heads = ProjectedHeads(self, positions.rope_2SD, keys_BS)
            y_BSV = self.core(heads, shared_BSH, (shared_BSH,), positions.mask)
            return self.o_proj.add_bias(self.tp.leave(self.o_proj(y_BSV, keys_BS)))

    def queries(self, x_BSH: torch.Tensor, keys_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Return queries [B, S, N, D], not yet turned, of tokens of these keys."""
        q_BSND = self.q_proj(x_BSH, keys_BS).unflatten(-1, (-1, self.size))
        return self.q_norm(q_BSND) if hasattr(self, "q_norm") else q_BSND

    def keys(self, x_BSH: torch.Tensor, keys_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Return keys [B, S, G, D], not yet turned."""
        k_BSGD = self.k_proj(x_BSH, keys_BS).unflatten(-1, (-1, self.size))
        return self.k_norm(k_BSGD) if hasattr(self, "k_norm") else k_BSGD

    def values(self, x_BSH: torch.Tensor, keys_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Return values [B, S, G, D]."""
        return self.v_proj(x_BSH, keys_BS).unflatten(-1, (-1, self.size))


@dataclass(frozen=True, eq=False)
class ProjectedHeads(Heads):
    """q, k and v of this rank's heads, made of the layer's input; `rope_2SD` is the rotary table of its positions,
    `keys_BS` those of its tokens.
    """

    layer: GroupedQueryAttention
    rope_2SD: torch.Tensor
    keys_BS: torch.Tensor | None = None
    alike = False  # keys and values are those of this rank's heads

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        return ()

    def queries(self, c_q: torch.Tensor) -> torch.Tensor:
        """Return turned queries [B, S, N, D]."""
        return self.layer.rope(self.layer.queries(c_q, self.keys_BS), self.rope_2SD)

    def keys_and_values(self, x_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return turned keys and values, [B, S, G, D] each."""
        k_BSGD, v_BSGD = self.layer.keys(x_BSH, self.keys_BS), self.layer.values(x_BSH, self.keys_BS)
        return self.layer.rope(k_BSGD, self.rope_2SD), v_BSGD

    def block(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Return turned keys and values side by side, [B, S, 2 * G * D]."""
        return torch.cat([x.flatten(-2) for x in self.keys_and_values(x_BSH)], -1)

    def keys_and_values_of(self, block_BTC: torch.Tensor, owner: int, tokens: slice
                           ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of some tokens of a block, which the rank that sent it has turned."""
        k, v = block_BTC.unflatten(-1, (2, -1, self.layer.size)).unbind(2)
        return k, v
