"""Grouped-query attention over the cache, with the weights of the training layer (model/attention/gqa.py).

The cache keeps of each token its turned keys and its values, side by side. Few tokens of many sequences are computed
together, with the heads of queries that share a head of keys as rows of one product; many tokens of one sequence alone.

Shapes: T tokens, N local heads of queries, G local heads of keys and values, D head dimension; of a group R sequences,
Q tokens of each, L places; P places of the past.
"""

import torch

from megatron_deepseek.inference.batch import Batch, Few, Many
from megatron_deepseek.inference.cache import PagedCache
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.attention.gqa import GroupedQueryAttention, ProjectedHeads
from megatron_deepseek.model.rotary import softmax_scale
from megatron_deepseek.ops.attention import LogSumExpMerge, Scores, attend, fused_attention

FEW = 16  # tokens of a sequence that are still computed with others: an answer's last one and its drafts


class CachedGQA:
    """One layer's attention. `name` is its tensor in the cache, `window` to how many tokens a token attends at most."""

    def __init__(self, attention: GroupedQueryAttention, config: ModelConfig, name: str, window: int | None):
        self.attention, self.name, self.window = attention, name, window
        self.size, self.scale = config.head_dim, softmax_scale(config)
        self.num_kv_heads = max(1, config.num_key_value_heads // attention.tp.size)

    @property
    def width(self) -> int:
        """Return how many numbers of a token the cache keeps."""
        return 2 * self.num_kv_heads * self.size

    def takes_few(self, queries: int, keys: int) -> bool:
        """Return whether a sequence's tokens are computed with others'."""
        return queries <= FEW

    def __call__(self, x_1TH: torch.Tensor, batch: Batch, rope_2TD: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        """Write what the cache keeps of these tokens, and return their attention's output [1, T, H]."""
        attention = self.attention
        heads, entered_1TH = ProjectedHeads(attention, rope_2TD), attention.tp.enter(x_1TH)
        block_TW = heads.block(entered_1TH)[0]
        cache[self.name].index_copy_(0, batch.slots_T, block_TW)

        q_TND = heads.queries(entered_1TH)[0]
        y_TND = torch.zeros_like(q_TND)
        for few in batch.few:
            y_TND[few.rows] = self._together(q_TND[few.rows], few, cache)
        for many in batch.many:
            y_TND[many.rows] = self._alone(q_TND[many.rows], block_TW[many.rows], many, cache)
        return attention.o_proj.add_bias(attention.tp.leave(attention.o_proj(y_TND.flatten(1).unsqueeze(0))))

    def weights_changed(self) -> None:
        """Do nothing: no weight is copied."""

    def _together(self, q_TND: torch.Tensor, few: Few, cache: PagedCache) -> torch.Tensor:
        """Return attention of the tokens of a group, [R * Q, N, D]."""
        sequences, queries = few.shape
        k_RGLD, v_RGLD = self._keys_and_values(cache.blocks(self.name, few.tables_Rn)[:, :few.length])
        q_RGnQD = q_TND.view(sequences, queries, self.num_kv_heads, -1, self.size).permute(0, 2, 3, 1, 4)
        sharing, mask = q_RGnQD.shape[2], few.mask(self.window, q_TND.dtype)
        if mask is not None:
            mask = mask.unsqueeze(1).repeat(1, 1, sharing, 1)  # [R, 1, n * Q, L]
        out = fused_attention(q_RGnQD.flatten(2, 3), k_RGLD, v_RGLD, attn_mask=mask, scale=self.scale)
        return out.unflatten(2, (sharing, queries)).permute(0, 3, 1, 2, 4).reshape(q_TND.shape)

    def _alone(self, q_TND: torch.Tensor, own_TW: torch.Tensor, many: Many, cache: PagedCache) -> torch.Tensor:
        """Return attention of one sequence's tokens over themselves and its past, [T, N, D]."""
        q_1NTD = q_TND.transpose(0, 1).unsqueeze(0)
        seen = len(many.past) if self.window is None else min(len(many.past), self.window - 1)
        past = cache[self.name].index_select(0, many.past[len(many.past) - seen:])
        if self.window is not None:
            return self._within_window(q_1NTD, torch.cat([past, own_TW]))[0].transpose(0, 1)
        own = attend(q_1NTD, *self._keys_and_values(own_TW.unsqueeze(0)), Scores(self.scale, causal=True))
        if not len(past):
            return own[0][0].transpose(0, 1)
        merged, everything = LogSumExpMerge.empty(q_1NTD, self.size), (slice(None),) * 3
        merged.add(everything, *own)
        merged.add(everything, *attend(q_1NTD, *self._keys_and_values(past.unsqueeze(0)), Scores(self.scale)))
        return merged.out_BNSV[0].transpose(0, 1).to(q_TND.dtype)

    def _within_window(self, q_1NTD: torch.Tensor, block_LW: torch.Tensor) -> torch.Tensor:
        """Return attention of the last tokens of `block_LW` to those before them within the window, [1, N, T, D]."""
        tokens, places = q_1NTD.shape[2], len(block_LW)
        k_1GLD, v_1GLD = self._keys_and_values(block_LW.unsqueeze(0))
        place_L = torch.arange(places, device=q_1NTD.device)
        distance_TL = place_L[places - tokens:].unsqueeze(1) - place_L
        seen_TL = (distance_TL >= 0) & (distance_TL < self.window)
        return fused_attention(q_1NTD, k_1GLD, v_1GLD, attn_mask=seen_TL, scale=self.scale,
                               enable_gqa=q_1NTD.shape[1] != k_1GLD.shape[1])

    def _keys_and_values(self, block_RLW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [R, G, L, D] of what the cache keeps."""
        k, v = block_RLW.unflatten(-1, (2, self.num_kv_heads, self.size)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)
