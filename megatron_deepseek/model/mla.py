"""Multi-head Latent Attention (arXiv 2405.04434, section 2.1).

    c_q  = norm(W_qa x)              query latent (without q-LoRA: x itself)
    c_kv = norm(W_kva x)             key-value latent; k_pe beside it is shared by all heads
    q    = [W_qb c_q] with its last dimensions turned by RoPE
    k, v = [W_kvb c_kv], k extended by the turned k_pe
    y    = W_o softmax(q k^T * scale) v

Down-projections and norms run on the stream between TP regions (a slice of the sequence under sequence parallelism);
what is gathered over TP is the latents. Up-projections are sharded by heads. Under context parallelism the key-value
latent and the turned k_pe are also what travels between the ranks that share a sequence.

Shapes: B batch, S sequence, H hidden, N local heads, C latent, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_deepseek.config import ModelConfig
from megatron_deepseek.model.positions import Positions
from megatron_deepseek.model.rotary import softmax_scale
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.products import Numerics
from megatron_deepseek.ops.recompute import compose, recompute
from megatron_deepseek.ops.rope import apply_rope, join_keys, turn_tail
from megatron_deepseek.parallel.context import ContextParallel, Project
from megatron_deepseek.parallel.tensor import (
    RMSNorm,
    TensorParallel,
    column_linear,
    replicated_linear,
    row_linear,
)

LATENT_NORM_EPS = 1e-6  # DeepSeek's and transformers' latent norms take this one, whatever rms_norm_eps is


class MLA(nn.Module):
    """Causal self-attention. `recompute_up_projection` re-makes q, k and v in the backward instead of keeping them."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, cp: ContextParallel,
                 recompute_up_projection: bool = False, numerics: Numerics = Numerics()):
        super().__init__()
        self.config, self.tp, self.cp = config, tp, cp
        self.scale = softmax_scale(config)
        self.joint_attention, self.output_form = numerics.attention, numerics.attention_output_form
        self.attend = recompute if recompute_up_projection else compose
        heads, bias, product = config.num_attention_heads, config.attention_bias, numerics.linear
        alone = tp.size == cp.size == 1  # else latents are gathered, or go round
        of_product, of_part = (numerics.norm_of_product, numerics.norm) if alone else (rms_norm, rms_norm)
        if config.q_lora_rank is None:
            self.q_proj = column_linear(config.hidden_size, heads * config.qk_head_dim, tp, product)
        else:
            self.q_a_proj = replicated_linear(config.hidden_size, config.q_lora_rank, tp, bias, product)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, tp, of_part if bias else of_product)
            self.q_b_proj = column_linear(config.q_lora_rank, heads * config.qk_head_dim, tp, product)
        self.kv_a_proj_with_mqa = replicated_linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, tp, bias, product)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, tp, of_part)
        self.kv_b_proj = column_linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), tp, product)
        self.o_proj = row_linear(heads * config.v_head_dim, config.hidden_size, tp, bias, numerics.attention_output)

    def forward(self, x_BSH: torch.Tensor, positions: Positions) -> torch.Tensor:
        c_q, c_kv, k_pe = self.kv_a_proj_with_mqa.product.shared(
            x_BSH, lambda shared_BSH: self.latents(shared_BSH, x_BSH))
        rope_2SD, documents = positions.rope_2SD, positions.documents
        if self.cp.size > 1:
            y_BSV = self.attend(lambda c_q: self.queries(c_q, rope_2SD), (c_q,),
                                lambda q: self.attention_over_ranks(q, c_kv, k_pe, positions))
        else:
            y_BSV = self.attend(lambda *latents: self.up_project(*latents, rope_2SD), (c_q, c_kv, k_pe),
                                lambda q, k, v: self.attention(q, k, v, documents))
        return self.o_proj.add_bias(self.tp.leave(self.o_proj(y_BSV)))

    def latents(self, shared_BSH: torch.Tensor, x_BSH: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query latent (or input x), key-value latent and k_pe of the whole sequence, gathered over TP at once.

        `shared_BSH` is x as the products take it.
        """
        c_kv, k_pe = self.kv_a_proj_with_mqa.add_bias(self.kv_a_proj_with_mqa(shared_BSH)).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        c_kv = self.kv_a_layernorm(c_kv)
        c_q = x_BSH if self.config.q_lora_rank is None else self.q_a_layernorm(
            self.q_a_proj.add_bias(self.q_a_proj(shared_BSH)))
        if self.tp.size == 1:
            return c_q, c_kv, k_pe
        sizes = [c_q.shape[-1], c_kv.shape[-1], k_pe.shape[-1]]
        return self.tp.enter(torch.cat([c_q, c_kv, k_pe], -1)).split(sizes, -1)

    def up_project(self, c_q, c_kv, k_pe, rope_2SD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys [B, S, N, nope + rope] and values [B, S, N, V] of this rank's heads.

        On CPU the values are padded to the keys' width, which the fused attention kernel needs.
        """
        q = self.queries(c_q, rope_2SD)
        k, v = self.keys_and_values(c_kv, k_pe, rope_2SD)
        return q, k, v if v.is_cuda else F.pad(v, (0, q.shape[-1] - v.shape[-1]))

    def queries(self, c_q: torch.Tensor, rope_2SD: torch.Tensor) -> torch.Tensor:
        nope, rope = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        project = self.q_proj if self.config.q_lora_rank is None else self.q_b_proj
        return turn_tail(project(c_q).unflatten(-1, (-1, nope + rope)), rope_2SD, nope)

    def keys_and_values(self, c_kv: torch.Tensor, k_pe_BSD: torch.Tensor, rope_2SD: torch.Tensor | None
                        ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the latent and k_pe, which all heads share; without a table k_pe has been turned."""
        nope, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        return join_keys(self.kv_b_proj(c_kv).unflatten(-1, (-1, nope + v_dim)), k_pe_BSD, rope_2SD, nope)

    def attention_over_ranks(self, q, c_kv, k_pe, positions: Positions) -> torch.Tensor:
        """Causal softmax attention over sequences that the context-parallel ranks share, [B, S, N * V]."""
        turned = apply_rope(k_pe.unsqueeze(2), positions.rope_2SD).squeeze(2)
        sizes = [c_kv.shape[-1], turned.shape[-1]]

        def project(block_BSC):
            c_kv, turned = block_BSC.split(sizes, -1)
            return self.keys_and_values(c_kv, turned, None)

        return self.cp.attention(q, torch.cat([c_kv, turned], -1), Project(project, (self.kv_b_proj.weight,)),
                                 self.scale, positions.sight, self.output_form)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None
                  ) -> torch.Tensor:
        """Causal softmax attention, within documents where they are given, [B, S, N * V]."""
        return self.joint_attention(q, k, v, documents, self.scale, self.config.v_head_dim)
