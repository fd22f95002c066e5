"""Context parallelism: the ranks of a group share each sequence, and attention sees all of it.

A sequence is cut in 2*cp chunks; rank r holds chunks r and 2*cp-1-r (zigzag), so that every rank has the same number of
causal pairs to compute. What travels between ranks (exchange.py) is not keys and values but what they are made of, in
MLA a latent of 576 numbers a token: each rank makes keys and values of the chunks it was given, uses them and drops
them, and does so again in the backward. Parts are joined by log-sum-exp (ops/attention.py): the result is exact.

Of the block of another rank o, rank r needs, without any mask:

    o == r   all queries, all keys, the lower triangle (local order is global order)
    o < r    all queries, the keys of chunk o; chunk 2*cp-1-o is later than all queries
    o > r    the queries of chunk 2*cp-1-r, all keys; chunk r is earlier than all keys

Labels, MTP shifts and masks are made on whole sequences before any is cut.

Shapes: B batch, S tokens of a sequence on this rank, N heads, D query width, V value width, C width of what travels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.ops.attention import Joined, Scores, attend, attend_backward, same_document
from megatron_deepseek.parallel.exchange import EXCHANGES, Gather, Ring

# [B, T, C] of any T tokens to keys [B, T, N, D] and values [B, T, N, V]
Project = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def zigzag(seq_length: int, rank: int, size: int) -> torch.Tensor:
    """Positions in the whole sequence of the tokens of `rank`, int64 [S], increasing."""
    if size == 1:
        return torch.arange(seq_length, device="cpu")
    if seq_length % (2 * size):
        raise ValueError(f"sequences of {seq_length} tokens do not divide into 2 x {size} chunks, two for each "
                         f"context-parallel rank")
    chunks = torch.arange(seq_length, device="cpu").chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The ranks that share a sequence, and how blocks travel among them: `exchange` is a name in EXCHANGES."""

    mesh: DeviceMesh
    exchange: str = "ring"

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def positions(self, seq_length: int) -> torch.Tensor:
        """Where this rank's tokens stand in the whole sequence."""
        return zigzag(seq_length, self.rank, self.size)

    def own(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This rank's part of something that has all positions of a sequence along `dim`."""
        return x if self.size == 1 else x.index_select(dim, self.positions(x.shape[dim]).to(x.device))

    def attention(self, q_BSND: torch.Tensor, block_BSC: torch.Tensor, project: Project, scale: float,
                  documents: torch.Tensor | None = None) -> torch.Tensor:
        """Causal attention of this rank's queries over the whole sequence, [B, S, N, V].

        With `documents` [B, whole sequence] given, over the tokens of the query's own document.

        `block_BSC` is what this rank's keys and values are made of by `project`, whose weights get their gradients
        by back-propagation inside this one's, as under reentrant checkpointing.
        """
        exchange = EXCHANGES[self.exchange](self.mesh.get_group())
        sight = Sight(self.rank, self.size, q_BSND.shape[1], scale, documents)
        return _BlockwiseAttention.apply(q_BSND, block_BSC, project, sight, exchange)


def visible(owner: int, rank: int, length: int) -> tuple[slice, slice, bool]:
    """Queries of `rank` that see anything of the block of `owner`, keys that are seen, and whether by a triangle."""
    everything = slice(0, length)
    if owner == rank:
        return everything, everything, True
    if owner < rank:
        return everything, slice(0, length // 2), False
    return slice(length // 2, length), everything, False


@dataclass(frozen=True, eq=False)
class Sight:
    """What the queries of `rank` see of each block; `length` tokens on each rank."""

    rank: int
    size: int
    length: int
    scale: float
    documents: torch.Tensor | None

    def of(self, owner: int) -> tuple[slice, slice, Scores]:
        rows, keys, causal = visible(owner, self.rank, self.length)
        if self.documents is None:
            return rows, keys, Scores(self.scale, causal)
        queried, seen = (self.documents[:, zigzag(self.length * self.size, rank, self.size)[part].to(
            self.documents.device)] for rank, part in ((self.rank, rows), (owner, keys)))
        mask = same_document(queried, seen)
        return rows, keys, Scores(self.scale, mask_BSK=mask.tril() if causal else mask)


class _BlockwiseAttention(torch.autograd.Function):
    """Keeps the blocks, not the keys and values made of them."""

    @staticmethod
    def forward(ctx, q_BSND, own_BSC, project: Project, sight: Sight, exchange: Ring | Gather):
        q_BNSD, blocks, owners, joined = q_BSND.transpose(1, 2), [], [], None
        for owner, block in exchange.blocks(own_BSC):
            rows, keys, scores = sight.of(owner)
            k, v = (x.transpose(1, 2) for x in project(block[:, keys]))
            joined = joined or Joined.empty(q_BNSD, v.shape[-1])
            joined.add(rows, *attend(q_BNSD[:, :, rows], k, v, scores))
            blocks.append(block)
            owners.append(owner)
        out_BNSV = joined.out_BNSV.to(q_BSND.dtype)
        ctx.save_for_backward(q_BSND, out_BNSV, joined.lse_BNS, *blocks)
        ctx.owners, ctx.project, ctx.sight, ctx.exchange = owners, project, sight, exchange
        return out_BNSV.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_BSNV):
        q_BSND, out_BNSV, lse_BNS, *blocks = ctx.saved_tensors
        q_BNSD, grad_BNSV = q_BSND.transpose(1, 2), grad_BSNV.transpose(1, 2)
        wide = torch.promote_types(q_BSND.dtype, torch.float32)
        grad_q_BNSD = torch.zeros_like(q_BNSD, dtype=wide)

        def gradients():
            for owner, block in zip(ctx.owners, blocks):
                rows, keys, scores = ctx.sight.of(owner)

                def through_attention(k, v):
                    grad_q, grad_k, grad_v = attend_backward(
                        grad_BNSV[:, :, rows], q_BNSD[:, :, rows], k.transpose(1, 2), v.transpose(1, 2),
                        out_BNSV[:, :, rows], lse_BNS[:, :, rows], scores)
                    grad_q_BNSD[:, :, rows] += grad_q
                    return grad_k.transpose(1, 2), grad_v.transpose(1, 2)

                yield _gradient_of_block(block, keys, ctx.project, through_attention)

        grad_own = ctx.exchange.return_gradients(gradients())
        return grad_q_BNSD.to(q_BSND.dtype).transpose(1, 2), grad_own, None, None, None


def _gradient_of_block(block: torch.Tensor, keys: slice, project: Project, through_attention) -> torch.Tensor:
    """Make keys and values again, and back-propagate what `through_attention` says of them."""
    part = block[:, keys].detach().requires_grad_()
    with torch.enable_grad():
        k, v = project(part)
    with torch.no_grad():
        upstream = through_attention(k.detach(), v.detach())
    torch.autograd.backward((k, v), upstream)
    gradient = torch.zeros_like(block)
    gradient[:, keys] = part.grad
    return gradient
