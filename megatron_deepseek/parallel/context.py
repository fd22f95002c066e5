"""Context parallelism: the ranks of a group share each sequence, and attention sees all of it.

A sequence is cut in 2*cp chunks; rank r holds chunks r and 2*cp-1-r (zigzag), so that every rank has the same number of
causal pairs to compute. What travels between ranks (exchange.py) is not keys and values but what they are made of, in
MLA a latent of 576 numbers a token: each rank makes keys and values of the chunks it was given, uses them and drops
them, and does so again in the backward. Parts are joined by log-sum-exp (ops/attention.py): the result is exact.

Of the block of another rank o, rank r needs, without any mask:

    o == r   all queries, all keys, the lower triangle (local order is global order)
    o < r    all queries, the keys of chunk o; chunk 2*cp-1-o is later than all queries
    o > r    the queries of chunk 2*cp-1-r, all keys; chunk r is earlier than all keys

With packed documents, of each of these only what lies within one document, again without any mask; a block that shares
no document with this rank's queries is passed on unread.

Labels, MTP shifts and masks are made on whole sequences before any is cut.

Shapes: B batch, S tokens of a sequence on this rank, N heads, D query width, V value width, C width of what travels.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.ops.attention import LogSumExpMerge, Output, Scores, attend, attend_backward
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.exchange import EXCHANGES, Gather, Ring


@dataclass(frozen=True, eq=False)
class Project:
    """`make`: from [B, T, C] of any T tokens to keys [B, T, N, D] and values [B, T, N, V]; it uses `weights`.

    Autograd does not see that: whoever has keys and values made out of its sight says that a gradient is needed, though
    of none of his inputs, by taking `anchor` as one more.
    """

    make: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    weights: tuple[torch.Tensor, ...]

    def anchor(self, device: torch.device) -> torch.Tensor:
        """A tensor of no elements that requires a gradient if a weight does."""
        return torch.empty(0, device=device, requires_grad=any(weight.requires_grad for weight in self.weights))


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

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    def positions(self, seq_length: int) -> torch.Tensor:
        """Where this rank's tokens stand in the whole sequence."""
        return zigzag(seq_length, self.rank, self.size)

    def own(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This rank's part of something that has all positions of a sequence along `dim`."""
        return x if self.size == 1 else x.index_select(dim, self.positions(x.shape[dim]).to(x.device))

    def block_mask(self, seq_length: int, documents: Documents | None = None) -> "BlockMask":
        """What this rank's tokens see of sequences of `seq_length`, each within its document where they are given."""
        return BlockMask(self.rank, self.size, seq_length // self.size, documents)

    def attention(self, q_BSND: torch.Tensor, block_BSC: torch.Tensor, project: Project, scale: float,
                  block_mask: "BlockMask", output: Output = Output()) -> torch.Tensor:
        """Causal attention of this rank's queries over the whole sequence, [B, S, N * V]; `output` says in which form.

        `block_BSC` is what this rank's keys and values are made of by `project`, whose weights get their gradients
        by back-propagation inside this one's.
        """
        exchange = EXCHANGES[self.exchange](self.group)
        anchor = project.anchor(q_BSND.device)
        return BlockwiseAttention.apply(q_BSND, block_BSC, anchor, project, scale, block_mask, exchange, output)


def visible(owner: int, rank: int, length: int) -> tuple[slice, slice, bool]:
    """Queries of `rank` that see anything of the block of `owner`, keys that are seen, and whether by a triangle."""
    everything = slice(0, length)
    if owner == rank:
        return everything, everything, True
    if owner < rank:
        return everything, slice(0, length // 2), False
    return slice(length // 2, length), everything, False


@dataclass(frozen=True)
class VisibleBlock:
    """Queries of this rank that see a rectangle or, `causal`, a triangle of the keys of one block."""

    batch: slice
    rows: slice
    keys: slice
    causal: bool

    def queries(self) -> tuple[slice, slice, slice]:
        """Index of the queries in [B, N, S]."""
        return self.batch, slice(None), self.rows

    def keys_among(self, made: slice) -> tuple[slice, slice, slice]:
        """Index of the keys in [B, N, K], of which only the keys `made` exist."""
        return self.batch, slice(None), slice(self.keys.start - made.start, self.keys.stop - made.start)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """What the queries of `rank` see of each rank's block; `length` tokens on each. The same for every layer."""

    rank: int
    size: int
    length: int
    documents: Documents | None

    def of(self, owner: int) -> tuple[slice, list[VisibleBlock]]:
        """The keys of the block of `owner` that are seen at all, and who sees what of them."""
        return self._blocks[owner]

    @cached_property
    def _blocks(self) -> tuple[tuple[slice, list[VisibleBlock]], ...]:
        return tuple(self._block(owner) for owner in range(self.size))

    def _block(self, owner: int) -> tuple[slice, list[VisibleBlock]]:
        rows, keys, causal = visible(owner, self.rank, self.length)
        if self.documents is None:
            return keys, [VisibleBlock(slice(None), rows, keys, causal)]
        parts = []
        for index, places in enumerate(self.documents.rows):
            for place in places:
                asking, seen = self._within(place, self.rank, rows), self._within(place, owner, keys)
                if asking and seen:
                    parts.append(VisibleBlock(slice(index, index + 1), asking, seen, causal))
        bounds = [(part.keys.start, part.keys.stop) for part in parts] or [(0, 0)]
        return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds)), parts

    def _within(self, place: slice, rank: int, part: slice) -> slice | None:
        """Where a document of the whole sequence lies in `part` of the block of `rank`, None if it does not.

        A block's two chunks are of increasing positions, so that a document of both of them is in one piece here too.
        """
        chunk, bounds = self.length // 2, []
        for begin, here in ((rank * chunk, 0), ((2 * self.size - 1 - rank) * chunk, chunk)):
            start, stop = max(place.start, begin), min(place.stop, begin + chunk)
            if start < stop:
                bounds += [start - begin + here, stop - begin + here]
        if not bounds:
            return None
        start, stop = max(bounds[0], part.start), min(bounds[-1], part.stop)
        return slice(start, stop) if start < stop else None


class BlockwiseAttention(torch.autograd.Function):
    """Keeps the blocks, not the keys and values made of them."""

    @staticmethod
    def forward(ctx, q_BSND, own_BSC, anchor, project: Project, scale: float, block_mask: BlockMask,
                exchange: Ring | Gather, output: Output):
        q_BNSD, blocks, owners, joined = q_BSND.transpose(1, 2), [], [], None
        for owner, block in exchange.blocks(own_BSC):
            made, parts = block_mask.of(owner)
            if parts:
                k, v = (x.transpose(1, 2) for x in project.make(block[:, made]))
                joined = joined or LogSumExpMerge.empty(q_BNSD, v.shape[-1])
            for part in parts:
                queries, keys = part.queries(), part.keys_among(made)
                joined.add(queries, *attend(q_BNSD[queries], k[keys], v[keys], Scores(scale, part.causal)))
            blocks.append(block)
            owners.append(owner)
        result, kept = output.give(joined.out_BNSV.to(q_BSND.dtype).transpose(1, 2).flatten(-2))
        ctx.save_for_backward(q_BSND, joined.lse_BNS, *blocks, *kept)
        ctx.owners, ctx.project, ctx.exchange, ctx.output = owners, project, exchange, output
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
            for owner, block in zip(ctx.owners, blocks):
                made, parts = block_mask.of(owner)

                def through_attention(k, v):
                    k, v = k.transpose(1, 2), v.transpose(1, 2)
                    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
                    for part in parts:
                        queries, keys = part.queries(), part.keys_among(made)
                        grad_q, grad_k[keys], grad_v[keys] = attend_backward(
                            grad_BNSV[queries], q_BNSD[queries], k[keys], v[keys], out_BNSV[queries],
                            lse_BNS[queries], Scores(ctx.scale, part.causal))
                        grad_q_BNSD[queries] += grad_q
                    return grad_k.transpose(1, 2), grad_v.transpose(1, 2)

                yield gradient_of_block(block, made, ctx.project, through_attention, block_needed) if parts \
                    else torch.zeros_like(block)

        block_needed, grad_own = ctx.needs_input_grad[1], None
        if block_needed:
            grad_own = ctx.exchange.return_gradients(gradients())
        else:  # of queries and weights alone; on all ranks, as they have the same weights
            deque(gradients(), maxlen=0)
        return grad_q_BNSD.to(q_BSND.dtype).transpose(1, 2), grad_own, None, None, None, None, None, None


def gradient_of_block(block: torch.Tensor, keys: slice, project: Project, through_attention, needed: bool
                       ) -> torch.Tensor:
    """Make keys and values again, and back-propagate what `through_attention` says of them: into the block, if its
    gradient is `needed`, and the weights.
    """
    part = block[:, keys].detach().requires_grad_(needed)
    with torch.enable_grad():
        k, v = project.make(part)
    with torch.no_grad():
        upstream = through_attention(k.detach(), v.detach())
    traced = [(made, gradient) for made, gradient in zip((k, v), upstream) if made.requires_grad]
    if traced:
        torch.autograd.backward(*zip(*traced))
    gradient = torch.zeros_like(block)
    if needed:
        gradient[:, keys] = part.grad
    return gradient
