"""Multi-head Latent Attention (arXiv 2405.04434, section 2.1).

    c_q  = norm(W_qa x)              query latent (without q-LoRA: x itself)
    c_kv = norm(W_kva x)             key-value latent; k_pe beside it is shared by all heads
    q    = [W_qb c_q] with its last dimensions turned by RoPE
    k, v = [W_kvb c_kv], k extended by the turned k_pe
    y    = W_o softmax(q k^T * scale) v

Down-projections and norms run on the stream between TP regions (a slice of the sequence under sequence parallelism);
what is gathered over TP is the latents. Up-projections are sharded by heads. Softmax attention itself is core.py's,
which asks `UpProjections` for q, k and v. Under context parallelism the key-value latent and the turned k_pe are also
what travels between the ranks that share a sequence.

Shapes: B batch, S sequence, T any tokens, H hidden, N local heads, C latent, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.attention.core import Heads, make_core
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.positions import Positions, TokenKeys
from megatron_deepseek.model.rotary import softmax_scale
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.rope import apply_rope, assemble_keys, rope_queries
from megatron_deepseek.parallel.tensor import ParallelLinear, RMSNorm, column_linear, replicated_linear, row_linear

LATENT_NORM_EPS = 1e-6  # DeepSeek's and transformers' latent norms take this one, whatever rms_norm_eps is


class MLA(nn.Module):
    """Causal self-attention with Hugging Face's parameter names."""

    def __init__(self, blueprint: Blueprint):
        super().__init__()
        config, tp, recipe = blueprint.config, blueprint.tp, blueprint.recipe
        self.config, self.tp = config, tp
        self.core = make_core(blueprint, softmax_scale(config), config.v_head_dim)
        heads, bias, gemm = config.num_attention_heads, config.attention_bias, recipe.linear
        straight = tp.size == 1 and self.core.projects_at_once  # else latents are gathered, or travel
        of_product, of_part = (recipe.norm_of_product, recipe.norm) if straight else (rms_norm, rms_norm)
        if config.q_lora_rank is None:
            self.q_proj = column_linear(config.hidden_size, heads * config.qk_head_dim, tp, gemm)
        else:
            self.q_a_proj = replicated_linear(config.hidden_size, config.q_lora_rank, tp, bias, gemm)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, tp, of_part if bias else of_product)
            self.q_b_proj = column_linear(config.q_lora_rank, heads * config.qk_head_dim, tp, gemm)
        self.kv_a_proj_with_mqa = replicated_linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, tp, bias, gemm)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, tp, of_part)
        self.kv_b_proj = column_linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), tp, gemm)
        self.rope_queries, self.assemble_keys = rope_queries, assemble_keys
        self.o_proj = row_linear(heads * config.v_head_dim, config.hidden_size, tp, bias, recipe.attention_output)

    def forward(self, x_BSH: torch.Tensor, positions: Positions) -> torch.Tensor:
        keys_BS = self.tp.stream_keys(positions.keys.own_BS)
        c_q, c_kv, k_pe = self.whole_sequence(*self.latents(x_BSH, keys_BS))
        w_qb = self.q_proj if self.config.q_lora_rank is None else self.q_b_proj
        heads = UpProjections(self.config, w_qb, self.kv_b_proj, positions.rope_2SD, positions.keys,
                              self.rope_queries, self.assemble_keys)
        y_BSV = self.core(heads, c_q, (c_kv, k_pe), positions.mask)
        return self.o_proj.add_bias(self.tp.leave(self.o_proj(y_BSV, positions.keys.own_BS)))

    def latents(self, x_BSH: torch.Tensor, keys_BS: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the query latent (or x itself), the key-value latent and k_pe, not yet turned, of the stream, whose
        tokens have these keys.
        """
        with self.kv_a_proj_with_mqa.gemm.shared(x_BSH) as shared_BSH:
            c_kv, k_pe = self.kv_a_proj_with_mqa.add_bias(self.kv_a_proj_with_mqa(shared_BSH, keys_BS)).split(
                [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
            c_kv = self.kv_a_layernorm(c_kv)
            if self.config.q_lora_rank is None:
                return x_BSH, c_kv, k_pe
            c_q = self.q_a_layernorm(self.q_a_proj.add_bias(self.q_a_proj(shared_BSH, keys_BS)))
            return c_q, c_kv, k_pe

    def whole_sequence(self, *latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the latents of the whole sequence, gathered over TP at once."""
        if self.tp.size == 1:
            return latents
        return self.tp.enter(torch.cat(latents, -1)).split([latent.shape[-1] for latent in latents], -1)


@dataclass(frozen=True, eq=False)
class UpProjections(Heads):
    """q, k and v of this rank's heads. `w_qb` and `w_kvb` are its slices of W_qb and W_kvb, `rope_2SD` the rotary table
    of this rank's positions, `keys` those of the tokens of all ranks. `rope_queries` and `assemble_keys` are those of
    ops/rope.py, or their graphs.
    """

    config: ModelConfig
    w_qb: ParallelLinear
    w_kvb: ParallelLinear
    rope_2SD: torch.Tensor
    keys: TokenKeys
    rope_queries: Callable[..., torch.Tensor]
    assemble_keys: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    alike = True  # latents are those of all heads

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.w_kvb.parameters())

    def queries(self, c_q: torch.Tensor) -> torch.Tensor:
        """Return queries [B, S, N, nope + rope], their rotary dimensions turned."""
        nope, rope = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        q_BSNX = self.w_qb(c_q, self.keys.own_BS).unflatten(-1, (-1, nope + rope))
        return self.rope_queries(q_BSNX, self.rope_2SD, nope)

    def keys_and_values(self, c_kv: torch.Tensor, k_pe_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [B, S, N, nope + rope] and values [B, S, N, V] of latents whose k_pe is turned here."""
        return self._keys_and_values(c_kv, k_pe_BSD, self.rope_2SD, self.keys.own_BS)

    def block(self, c_kv: torch.Tensor, k_pe_BSD: torch.Tensor) -> torch.Tensor:
        """Return the key-value latent with the turned k_pe beside it, [B, S, C + rope]: 512 + 64 numbers a token in V3.
        """
        turned = apply_rope(k_pe_BSD.unsqueeze(2), self.rope_2SD).squeeze(2)
        return torch.cat([c_kv, turned], -1)

    def keys_and_values_of(self, block_BTC: torch.Tensor, owner: int, tokens: slice
                           ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of some tokens of a block, whose k_pe has been turned by the rank that sent it."""
        c_kv, turned = block_BTC.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        return self._keys_and_values(c_kv, turned, None, self.keys.of(owner, tokens))

    def _keys_and_values(self, c_kv: torch.Tensor, k_pe_BTD: torch.Tensor, rope_2SD: torch.Tensor | None,
                         keys_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        nope, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        kv_BTNX = self.w_kvb(c_kv, keys_BT).unflatten(-1, (-1, nope + v_dim))
        return self.assemble_keys(kv_BTNX, k_pe_BTD, rope_2SD, nope)
