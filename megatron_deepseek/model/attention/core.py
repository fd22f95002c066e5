"""The core of attention, softmax(q k^T * scale) v within what a token may see: one protocol, one class for each kind.

    WholeSequenceAttention     this rank has whole sequences, dense or packed (ops/attention.py, ops/fp8/attention.py)
    ContextParallelAttention   ranks share each sequence; blocks travel by a ring or an all-gather
                               (parallel/blockwise_attention.py)
    WindowAttention            either of these in a layer whose tokens see a sliding window (parallel/window_mask.py)

A layer of attention has the projections of its paper alone. It hands the core its latents, and `Heads`, which says how
queries, keys and values are made of them. The core decides where and when that is done, because that is what the kinds
differ in: one makes all of them at once and has them recomputed in the backward, the other makes keys and values block
by block, of other ranks' tokens too, and never keeps them. Every kind gets what may be seen as the same `CausalMask`
(mask.py). `make_core` chooses; no layer knows which kind it has.

mla.py and gqa.py are the layers. What they hand over as latents is in MLA what up-projections are made of, in
grouped-query attention the layer's input itself; there a block is keys and values side by side, so that no weight is
needed for what travels. Fewer heads of keys than of queries are for the kernels of ops/attention.py.

Where another attention will stand: a sparse indexer (DeepSeek-V3.2) is a core. It scores the latents, chooses keys for
each query within the mask, and attends to those; its own projections are one more member of `Heads`.

Shapes: B batch, S tokens of a sequence on this rank, T any number of tokens, N heads on this rank (of keys and values
perhaps fewer, G), D query and key width, V value width, C width of a latent.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.model.attention.mask import CausalMask
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.ops.attention import Output
from megatron_deepseek.ops.recompute import kept, recomputed
from megatron_deepseek.parallel.block_mask import BlockMask
from megatron_deepseek.parallel.blockwise_attention import KeyValueProjection, blockwise_attention
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.exchange import Alone, Gather, Ring, Sliced
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.window_mask import WindowMask


class Heads(Protocol):
    """How a layer makes this rank's heads of its latents. `c_kv` are whatever tensors it makes keys and values of."""

    alike: bool
    """Whether the blocks are the same on all ranks of a tensor-parallel group, so that each may send a part of them."""

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """Return the weights that `keys_and_values_of` uses, which may be frozen."""

    def queries(self, c_q: torch.Tensor) -> torch.Tensor:
        """Return queries [B, S, N, D] of this rank's tokens."""

    def keys_and_values(self, *c_kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [B, S, G, D] and values [B, S, G, V] of this rank's tokens."""

    def block(self, *c_kv: torch.Tensor) -> torch.Tensor:
        """Return [B, S, C], of which any rank can make keys and values: this rank's positions are already in it."""

    def keys_and_values_of(self, block_BTC: torch.Tensor, owner: int, tokens: slice
                           ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [B, T, G, D] and values [B, T, G, V] of those `tokens` of the block of the rank `owner`."""


class CoreAttention(ABC):
    """One kind of softmax attention, the same object for every micro-batch."""

    projects_at_once: bool
    """Whether latents go straight into the up-projections, so that they may come as FP8 tiles; else they travel."""

    @abstractmethod
    def __call__(self, heads: Heads, c_q: torch.Tensor, c_kv: tuple[torch.Tensor, ...], mask: CausalMask
                 ) -> torch.Tensor:
        """Return the output of this rank's queries and heads, [B, S, N * V]."""


@dataclass(frozen=True)
class WholeSequenceAttention(CoreAttention):
    """Attention over sequences that this rank has whole, document by document where they are packed.

    `attention` is ops/attention.py's or the FP8 recipe's. `projected` keeps queries, keys and values for the backward
    (`kept`) or has them made again there (`recomputed`).
    """

    attention: Callable[..., torch.Tensor]
    projected: Callable[..., AbstractContextManager]
    scale: float
    value_width: int
    projects_at_once = True

    def __call__(self, heads, c_q, c_kv, mask):
        def project(c_q, *c_kv):
            return _equally_wide_on_cpu(heads.queries(c_q), *heads.keys_and_values(*c_kv))

        with self.projected(project, c_q, *c_kv) as (q, k, v):
            return self.attention(q, k, v, mask.documents, self.scale, self.value_width)


@dataclass(frozen=True)
class ContextParallelAttention(CoreAttention):
    """Attention over sequences that the ranks of `cp` share. The narrow blocks travel, not the keys and values.

    `projected` is for the queries alone: keys and values are always made again. `output` says in which form attention's
    output is handed on and kept.
    """

    cp: ContextParallel
    tp: TensorParallel
    output: Output
    projected: Callable[..., AbstractContextManager]
    scale: float
    projects_at_once = False

    def __call__(self, heads, c_q, c_kv, mask):
        with self.projected(heads.queries, c_q) as q:
            keys_and_values = KeyValueProjection(heads.keys_and_values_of, heads.weights)
            return blockwise_attention(q, heads.block(*c_kv), keys_and_values, self.scale, mask.blocks,
                                       _exchange(self.cp, self.tp, heads, q), self.output)


@dataclass(frozen=True)
class WindowAttention(CoreAttention):
    """Attention to the last `window` tokens alone, by the parts of the scores that it leaves; else the fields are those
    of ContextParallelAttention.
    """

    cp: ContextParallel
    tp: TensorParallel
    output: Output
    projected: Callable[..., AbstractContextManager]
    scale: float
    window: int
    projects_at_once = False

    def __call__(self, heads, c_q, c_kv, mask):
        with self.projected(heads.queries, c_q) as q:
            shared = mask.blocks is not None
            blocks = mask.blocks if shared else BlockMask(0, 1, q.shape[1], mask.documents)
            exchange = _exchange(self.cp, self.tp, heads, q) if shared else Alone()
            keys_and_values = KeyValueProjection(heads.keys_and_values_of, heads.weights)
            return blockwise_attention(q, heads.block(*c_kv), keys_and_values, self.scale,
                                       WindowMask(blocks, self.window), exchange, self.output)


def _exchange(cp: ContextParallel, tp: TensorParallel, heads: Heads, q_BSND: torch.Tensor) -> Ring | Gather | Sliced:
    return cp.make_exchange(q_BSND.shape[1], tp.group if heads.alike else None)


def make_core(blueprint: Blueprint, scale: float, value_width: int, window: int | None = None) -> CoreAttention:
    """Return the kind of attention that this layout takes, for values of `value_width` numbers a head.

    `window`: to how many tokens a token attends, itself among them; None to all before it.
    """
    projected = recomputed if "mla_up_proj" in blueprint.recomputed else kept
    recipe, ranks = blueprint.recipe, (blueprint.cp, blueprint.tp)
    if window is not None:
        return WindowAttention(*ranks, recipe.attention_output_form, projected, scale, window)
    if blueprint.cp.size > 1:
        return ContextParallelAttention(*ranks, recipe.attention_output_form, projected, scale)
    return WholeSequenceAttention(recipe.attention, projected, scale, value_width)


def _equally_wide_on_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
                         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v; on the CPU with zeros behind v, whose fused attention kernel needs values as wide as keys.

    MLA's values that need no zeros are copied too: what is kept is then they alone, not the projection that they are a
    part of.
    """
    padding = q.shape[-1] - v.shape[-1]
    if on_accelerator(v):
        return q, k, v
    return q, k, F.pad(v, (0, padding)) if padding else v.contiguous()
