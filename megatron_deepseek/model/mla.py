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

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.positions import Positions
from megatron_deepseek.model.rotary import softmax_scale
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.precision_recipe import PrecisionRecipe
from megatron_deepseek.ops.recompute import kept, recomputed
from megatron_deepseek.ops.rope import apply_rope, assemble_keys, rope_queries
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
                 recompute_up_projection: bool = False, recipe: PrecisionRecipe = PrecisionRecipe()):
        super().__init__()
        self.config, self.tp, self.cp = config, tp, cp
        self.scale = softmax_scale(config)
        self.joint_attention, self.output_form = recipe.attention, recipe.attention_output_form
        self.projected = recomputed if recompute_up_projection else kept
        heads, bias, gemm = config.num_attention_heads, config.attention_bias, recipe.linear
        alone = tp.size == cp.size == 1  # else latents are gathered, or go round
        of_product, of_part = (recipe.norm_of_product, recipe.norm) if alone else (rms_norm, rms_norm)
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
        self.o_proj = row_linear(heads * config.v_head_dim, config.hidden_size, tp, bias, recipe.attention_output)

    def forward(self, x_BSH: torch.Tensor, positions: Positions) -> torch.Tensor:
        c_q, c_kv, k_pe = self.whole_sequence(*self.latents(x_BSH))
        if self.cp.size == 1:
            up_project = partial(self.up_project, rope_2SD=positions.rope_2SD)
            with self.projected(up_project, c_q, c_kv, k_pe) as (q, k, v):
                y_BSV = self.attention(q, k, v, positions.documents)
        else:
            queries = partial(self.queries, rope_2SD=positions.rope_2SD)
            with self.projected(queries, c_q) as q:
                y_BSV = self.attention_over_ranks(q, c_kv, k_pe, positions)
        return self.o_proj.add_bias(self.tp.leave(self.o_proj(y_BSV)))

    def latents(self, x_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the query latent (or x itself), the key-value latent and k_pe, not yet turned, of the stream."""
        with self.kv_a_proj_with_mqa.gemm.shared(x_BSH) as shared_BSH:
            c_kv, k_pe = self.kv_a_proj_with_mqa.add_bias(self.kv_a_proj_with_mqa(shared_BSH)).split(
                [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
            c_kv = self.kv_a_layernorm(c_kv)
            if self.config.q_lora_rank is None:
                return x_BSH, c_kv, k_pe
            c_q = self.q_a_layernorm(self.q_a_proj.add_bias(self.q_a_proj(shared_BSH)))
            return c_q, c_kv, k_pe

    def whole_sequence(self, *latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the latents of the whole sequence, gathered over TP at once."""
        if self.tp.size == 1:
            return latents
        return self.tp.enter(torch.cat(latents, -1)).split([latent.shape[-1] for latent in latents], -1)

    def up_project(self, c_q: torch.Tensor, c_kv: torch.Tensor, k_pe: torch.Tensor, rope_2SD: torch.Tensor
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries and keys [B, S, N, nope + rope] and values [B, S, N, V] of this rank's heads.

        On CPU the values are padded to the keys' width, which the fused attention kernel needs.
        """
        q = self.queries(c_q, rope_2SD)
        k, v = self.keys_and_values(c_kv, k_pe, rope_2SD)
        return q, k, v if v.is_cuda else F.pad(v, (0, q.shape[-1] - v.shape[-1]))

    def queries(self, c_q: torch.Tensor, rope_2SD: torch.Tensor) -> torch.Tensor:
        """Return this rank's heads of queries, [B, S, N, nope + rope], their rotary dimensions turned."""
        nope, rope = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        project = self.q_proj if self.config.q_lora_rank is None else self.q_b_proj
        return rope_queries(project(c_q).unflatten(-1, (-1, nope + rope)), rope_2SD, nope)

    def keys_and_values(self, c_kv: torch.Tensor, k_pe_BSD: torch.Tensor, rope_2SD: torch.Tensor | None
                        ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the latent and of k_pe, which all heads share; without a table k_pe is turned
        already.
        """
        nope, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        return assemble_keys(self.kv_b_proj(c_kv).unflatten(-1, (-1, nope + v_dim)), k_pe_BSD, rope_2SD, nope)

    def attention_over_ranks(self, q, c_kv, k_pe, positions: Positions) -> torch.Tensor:
        """Return causal softmax attention over sequences that the context-parallel ranks share, [B, S, N * V]."""
        turned = apply_rope(k_pe.unsqueeze(2), positions.rope_2SD).squeeze(2)
        sizes = [c_kv.shape[-1], turned.shape[-1]]

        def project(block_BSC):
            c_kv, turned = block_BSC.split(sizes, -1)
            return self.keys_and_values(c_kv, turned, None)

        return self.cp.attention(q, torch.cat([c_kv, turned], -1), Project(project, (self.kv_b_proj.weight,)),
                                 self.scale, positions.block_mask, self.output_form)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None
                  ) -> torch.Tensor:
        """Return causal softmax attention, within documents where they are given, [B, S, N * V]."""
        return self.joint_attention(q, k, v, documents, self.scale, self.config.v_head_dim)
