"""Attention over sequences that several ranks share, block by block.

What travels between ranks (exchange.py) is not keys and values but what they are made of, in MLA a latent of 576
numbers a token. Each rank makes keys and values of the blocks that it was given, uses them and drops them, and does so
again in the backward. Results of the blocks are joined by log-sum-exp (ops/attention.py), which is exact.

Shapes: B batch, S tokens of a sequence on this rank, T any tokens, N heads, D query width, V value width, C width of
what travels.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_deepseek.ops.attention import LogSumExpMerge, Output, Scores, attend, attend_backward
from megatron_deepseek.parallel.block_mask import BlockMask
from megatron_deepseek.parallel.exchange import Alone, Gather, Ring, Sliced, own_last
from megatron_deepseek.parallel.window_mask import WindowMask

Exchange = Ring | Gather | Sliced | Alone
Mask = BlockMask | WindowMask


@dataclass(frozen=True, eq=False)
class KeyValueProjection:
    """`make` turns [B, T, C], which are some tokens of a rank's block, into keys [B, T, N, D] and values [B, T, N, V].

    It is told the rank and which tokens, and uses `weights`.
    """

    make: Callable[[torch.Tensor, int, slice], tuple[torch.Tensor, torch.Tensor]]
    weights: tuple[torch.Tensor, ...]

    def anchor(self, device: torch.device) -> torch.Tensor:
        """Return a tensor of no elements that requires a gradient if one of the weights does.

        Autograd does not see that an autograd function uses the weights. With the anchor as an input, its backward is
        called even where none of its other inputs needs a gradient.
        """
        return torch.empty(0, device=device, requires_grad=any(weight.requires_grad for weight in self.weights))


def blockwise_attention(q_BSND: torch.Tensor, block_BSC: torch.Tensor, projection: KeyValueProjection, scale: float,
                        block_mask: Mask, exchange: Exchange, output: Output = Output()) -> torch.Tensor:
    """Return causal attention of this rank's queries over the whole sequence, [B, S, N * V]; `output` says in which
    form.

    `projection` makes this rank's keys and values of `block_BSC`. Its weights get their gradients by back-propagation
    inside this one's.
    """
    anchor = projection.anchor(q_BSND.device)
    return BlockwiseAttention.apply(q_BSND, block_BSC, anchor, projection, scale, block_mask, exchange, output)


class BlockwiseAttention(torch.autograd.Function):
    """Keeps the blocks for the backward, not the keys and values made of them."""

    @staticmethod
    def forward(ctx, q_BSND, own_BSC, anchor, projection: KeyValueProjection, scale: float, block_mask: Mask,
                exchange: Exchange, output: Output):
        q_BNSD, blocks, owners, joined = q_BSND.transpose(1, 2), [], [], None
        for owner, block in exchange.blocks(own_BSC):
            made, parts = block_mask.of(owner)
            if parts:
                k, v = (x.transpose(1, 2) for x in projection.make(block[:, made], owner, made))
                joined = joined or LogSumExpMerge.empty(q_BNSD, v.shape[-1])
            for part in parts:
                queries, keys = part.queries(), part.keys_among(made)
                read = (part.read(x) for x in (q_BNSD[queries], k[keys], v[keys]))
                joined.add(queries, *map(part.read, attend(*read, Scores(scale, part.causal))))
            blocks.append(block)
            owners.append(owner)
        result, kept = output.give(joined.out_BNSV.to(q_BSND.dtype).transpose(1, 2).flatten(-2))
        ctx.save_for_backward(q_BSND, joined.lse_BNS, *blocks, *kept)
        ctx.owners, ctx.projection, ctx.exchange, ctx.output = owners, projection, exchange, output
        ctx.block_mask, ctx.scale = block_mask, scale
        return result

    @staticmethod
    def backward(ctx, grad_BSV):
        q_BSND, lse_BNS, *saved = ctx.saved_tensors
        blocks, kept = saved[:len(ctx.owners)], saved[len(ctx.owners):]
        out_BSV = ctx.output.restore(kept, grad_BSV)
        out_BNSV, grad_BNSV = (x.unflatten(-1, (q_BSND.shape[2], -1)).transpose(1, 2) for x in (out_BSV, grad_BSV))
        q_BNSD, block_mask = q_BSND.transpose(1, 2), ctx.block_mask
        wide = torch.promote_types(q_BSND.dtype, torch.float32)
        grad_q_BNSD = torch.zeros_like(q_BNSD, dtype=wide)

        def gradients():
            for owner, block in own_last([*zip(ctx.owners, blocks)]):
                made, parts = block_mask.of(owner)

                def through_attention(k, v):
                    k, v = k.transpose(1, 2), v.transpose(1, 2)
                    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)  # a window's parts share keys
                    for part in parts:
                        queries, keys = part.queries(), part.keys_among(made)
                        read = map(part.read, (grad_BNSV[queries], q_BNSD[queries], k[keys], v[keys],
                                               out_BNSV[queries], lse_BNS[queries]))
                        gradients = attend_backward(*read, Scores(ctx.scale, part.causal))
                        for total, place, gradient in zip((grad_q_BNSD, grad_k, grad_v), (queries, keys, keys),
                                                          map(part.read, gradients)):
                            total[place] += gradient
                        del gradients, gradient  # before the next part makes its own
                    return grad_k.transpose(1, 2), grad_v.transpose(1, 2)

                yield gradient_of_block(block, owner, made, ctx.projection, through_attention, block_needed) if parts \
                    else torch.zeros_like(block)

        block_needed, grad_own = ctx.needs_input_grad[1], None
        if block_needed:
            grad_own = ctx.exchange.return_gradients(gradients())
        else:  # only queries and weights need gradients; that is so on all ranks, as their weights are the same ones
            deque(gradients(), maxlen=0)
        return grad_q_BNSD.to(q_BSND.dtype).transpose(1, 2), grad_own, None, None, None, None, None, None


def gradient_of_block(block: torch.Tensor, owner: int, keys: slice, projection: KeyValueProjection, through_attention,
                      needed: bool) -> torch.Tensor:
    """Return the gradient of the block of `owner`; zeros unless it is `needed`. Weights get theirs on the way.

    Keys and values are made again, and their gradients, which `through_attention` gives, are back-propagated through
    the projection.
    """
    part = block[:, keys].detach().requires_grad_(needed)
    with torch.enable_grad():
        k, v = projection.make(part, owner, keys)
    with torch.no_grad():
        upstream = through_attention(k.detach(), v.detach())
    traced = [(made, gradient) for made, gradient in zip((k, v), upstream) if made.requires_grad]
    if traced:
        torch.autograd.backward(*zip(*traced))
    gradient = torch.zeros_like(block)
    if needed:
        gradient[:, keys] = part.grad
    return gradient
