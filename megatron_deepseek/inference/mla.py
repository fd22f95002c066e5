"""Multi-head latent attention over the cache, with the weights of the training layer (model/attention/mla.py).

The cache keeps of each token the normed latent c and the turned rotary key k_pe that all heads share. There are two
ways to attend to it, with the same result (facts of the arithmetic: DeepSeek-V2, arXiv 2405.04434, section 2.1.2):

  absorbed   q W_k is a query for the latents themselves, and W_v is applied to their weighted sum: one "head" of keys
             is read for all heads. For few tokens, as in decoding.
  expanded   keys and values of all heads are made of the latents, the past chunk by chunk, merged by log-sum-exp. For
             many tokens, as in prefill.

Shapes: T tokens, N local heads, C latent, D rotary dimensions, W = C + D; of a group R sequences, Q tokens of each, L
places; V value width.
"""

import torch

from megatron_deepseek.inference.batch import Batch, Few, Many
from megatron_deepseek.inference.cache import PagedCache
from megatron_deepseek.inference.quantised import dense_weight
from megatron_deepseek.model.attention.mla import MLA
from megatron_deepseek.model.rotary import softmax_scale
from megatron_deepseek.ops.attention import LogSumExpMerge, Scores, attend, fused_attention
from megatron_deepseek.ops.products import multiply_each
from megatron_deepseek.ops.rope import apply_rope

PAST_CHUNK = 1024  # tokens of the past whose keys and values exist at once


class CachedMLA:
    """One layer's attention. `name` is its tensor in the cache."""

    def __init__(self, attention: MLA, name: str):
        self.attention, self.config, self.name = attention, attention.config, name
        self.scale = softmax_scale(attention.config)
        self._absorbed_weights: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def width(self) -> int:
        """Return how many numbers of a token the cache keeps."""
        return self.config.kv_lora_rank + self.config.qk_rope_head_dim

    def takes_few(self, queries: int, keys: int) -> bool:
        """Return whether the absorbed way has fewer multiplications for one head, of `queries` tokens over `keys`."""
        config = self.config
        latent, up = config.kv_lora_rank, config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        absorbed = queries * (up + keys * (2 * latent + config.qk_rope_head_dim))
        expanded = keys * up + queries * keys * (config.qk_head_dim + config.v_head_dim)
        return absorbed < expanded

    def __call__(self, x_1TH: torch.Tensor, batch: Batch, rope_2TD: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        """Write what the cache keeps of these tokens, and return their attention's output [1, T, H]."""
        attention, config = self.attention, self.config
        c_q, c_kv, k_pe = attention.whole_sequence(*attention.latents(x_1TH))
        k_pe = apply_rope(k_pe.unsqueeze(2), rope_2TD).squeeze(2)
        latents_TW = torch.cat([c_kv, k_pe], -1)[0]
        cache[self.name].index_copy_(0, batch.slots_T, latents_TW)

        w_qb = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
        q_1TNX = w_qb(c_q).unflatten(-1, (-1, config.qk_head_dim))
        q_TNX = attention.rope_queries(q_1TNX, rope_2TD, config.qk_nope_head_dim)[0]
        y_TNV = q_TNX.new_zeros(*q_TNX.shape[:2], config.v_head_dim)
        if batch.few:
            y_TNV[:batch.num_few] = self._absorbed(q_TNX[:batch.num_few], batch.few, cache)
        for many in batch.many:
            y_TNV[many.rows] = self._expanded(q_TNX[many.rows], latents_TW[many.rows], many, cache)
        return attention.o_proj.add_bias(attention.tp.leave(attention.o_proj(y_TNV.flatten(1).unsqueeze(0))))

    def _absorbed(self, q_TNX: torch.Tensor, groups: list[Few], cache: PagedCache) -> torch.Tensor:
        """Return attention of the tokens of `groups`, [T, N, V]."""
        nope = self.config.qk_nope_head_dim
        w_k_NXC, w_v_NVC = self._weights(q_TNX.dtype)
        q_NTC = multiply_each(q_TNX[..., :nope].transpose(0, 1), w_k_NXC)
        q_TNW = torch.cat([q_NTC.transpose(0, 1), q_TNX[..., nope:]], -1)
        sums = [self._over_latents(q_TNW[group.rows], group, cache) for group in groups]
        o_TNC = sums[0] if len(sums) == 1 else torch.cat(sums)
        return multiply_each(o_TNC.transpose(0, 1), w_v_NVC.mT).transpose(0, 1)

    def _weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W_k [N, nope, C] and W_v [N, V, C] of each head, as plain numbers.

        They are copied once: as strided parts of W_kvb products took up to twice as long on the CPU, and a weight of
        FP8 or NF4 would be made plain in every step.
        """
        if self._absorbed_weights is None:
            nope, value = self.config.qk_nope_head_dim, self.config.v_head_dim
            weight = dense_weight(self.attention.kv_b_proj, dtype).unflatten(0, (-1, nope + value))
            self._absorbed_weights = weight[:, :nope].contiguous(), weight[:, nope:].contiguous()
        return self._absorbed_weights

    def weights_changed(self) -> None:
        """Copy the weights anew when they are next needed."""
        self._absorbed_weights = None

    def _over_latents(self, q_TNW: torch.Tensor, group: Few, cache: PagedCache) -> torch.Tensor:
        """Return the weighted sums of latents of one group, [R * Q, N, C]."""
        sequences, queries = group.shape
        past_RLW = cache.blocks(self.name, group.tables_Rn)[:, :group.length]
        past_RQLW = past_RLW.unsqueeze(1).expand(-1, queries, -1, -1)
        mask = group.mask(None, q_TNW.dtype)
        mask = None if mask is None else mask.unsqueeze(2)
        out_RQNW = fused_attention(q_TNW.view(sequences, queries, *q_TNW.shape[1:]), past_RQLW, past_RQLW,
                                   attn_mask=mask, scale=self.scale)
        return out_RQNW.flatten(0, 1)[..., :self.config.kv_lora_rank]

    def _expanded(self, q_TNX: torch.Tensor, own_TW: torch.Tensor, many: Many, cache: PagedCache) -> torch.Tensor:
        """Return attention of one sequence's tokens over themselves and its past, [T, N, V]."""
        q_1NTX = q_TNX.transpose(0, 1).unsqueeze(0)
        own = attend(q_1NTX, *self._keys_and_values(own_TW), Scores(self.scale, causal=True))
        if not len(many.past):
            return own[0][0].transpose(0, 1)
        merged = LogSumExpMerge.empty(q_1NTX, self.config.v_head_dim)
        everything = (slice(None),) * 3
        merged.add(everything, *own)
        for slots in many.past.split(PAST_CHUNK):
            past = cache[self.name].index_select(0, slots)
            merged.add(everything, *attend(q_1NTX, *self._keys_and_values(past), Scores(self.scale)))
        return merged.out_BNSV[0].transpose(0, 1).to(q_TNX.dtype)

    def _keys_and_values(self, latents_LW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [1, N, L, X] and values [1, N, L, V] of latents."""
        config = self.config
        c_kv, k_pe = latents_LW.unsqueeze(0).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        heads = self.attention.kv_b_proj(c_kv).unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim))
        k, v = self.attention.assemble_keys(heads, k_pe, None, config.qk_nope_head_dim)
        return k.transpose(1, 2), v.transpose(1, 2)
