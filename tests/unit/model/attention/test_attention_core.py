"""The kinds of the core of attention, under a layer that is not MLA: all give what softmax over all scores gives.

float64 sums in another order: EXACT.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_deepseek.model.attention.core import ContextParallelAttention, Heads, WholeSequenceAttention
from megatron_deepseek.model.attention.mask import CausalMask
from megatron_deepseek.ops.attention import Output, attention
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.recompute import kept, recomputed
from megatron_deepseek.parallel.block_mask import BlockMask
from megatron_deepseek.parallel.context import zigzag

EXACT = {"rtol": 1e-12, "atol": 1e-13}
B, S, N, D, V, SCALE = 2, 8, 3, 6, 4, 0.3
NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2, 2]])
PACKINGS = pytest.mark.parametrize("documents", [None, Documents.find(NUMBERS)], ids=["dense", "packed"])


class MultiHead(Heads):
    """Multi-head attention: the latents are queries, keys and values themselves."""

    weights, alike = (), False

    def queries(self, c_q):
        return 2 * c_q.unflatten(-1, (N, D))

    def keys_and_values(self, k, v):
        return 3 * k.unflatten(-1, (N, D)), v.unflatten(-1, (N, V)) + 1

    def block(self, k, v):
        return torch.cat([k, v], -1)

    def keys_and_values_of(self, block_BTC, owner, tokens):
        return self.keys_and_values(*block_BTC.split([N * D, N * V], -1))


def latents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, N * width, generator=generator, dtype=torch.float64, requires_grad=True)
            for width in (D, D, V)]


def expected(c_q: torch.Tensor, c_kv: tuple[torch.Tensor, ...], documents: Documents | None) -> torch.Tensor:
    """Return softmax attention with all its scores, [B, S, N * V]."""
    heads = MultiHead()
    q, k, v = (x.transpose(1, 2) for x in (heads.queries(c_q), *heads.keys_and_values(*c_kv)))
    seen = torch.ones(B, 1, S, S, dtype=torch.bool).tril()
    if documents is not None:
        seen = seen & (NUMBERS.unsqueeze(2) == NUMBERS.unsqueeze(1)).unsqueeze(1)
    logits = (q @ k.mT * SCALE).masked_fill(~seen, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)


@PACKINGS
@pytest.mark.parametrize("projected", [kept, recomputed])
def test_whole_sequences(documents, projected):
    """Output and gradients, with values narrower than keys."""
    c_q, *c_kv = inputs = latents()
    core = WholeSequenceAttention(attention, projected, SCALE, V)
    found, wanted = core(MultiHead(), c_q, c_kv, CausalMask(documents)), expected(c_q, c_kv, documents)
    torch.testing.assert_close(found, wanted, **EXACT)
    upstream = torch.randn(wanted.shape, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


class Neighbours:
    """An exchange that hands out this rank's own block and `others`."""

    def __init__(self, rank: int, others: dict[int, torch.Tensor]):
        self.rank, self.others = rank, others

    def blocks(self, own: torch.Tensor):
        yield self.rank, own
        yield from self.others.items()


@PACKINGS
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_that_share_the_sequences(documents, rank):
    """What it is given of the other rank is a block; its own rows are those of whole sequences."""
    c_q, *c_kv = (x.detach() for x in latents())
    rows, others = zigzag(S, rank, 2), zigzag(S, 1 - rank, 2)
    theirs = MultiHead().block(*(x[:, others] for x in c_kv))
    cp = SimpleNamespace(make_exchange=lambda length, alike: Neighbours(rank, {1 - rank: theirs}))
    core = ContextParallelAttention(cp, None, Output(), kept, SCALE)
    mask = CausalMask(documents, BlockMask(rank, 2, S // 2, documents))
    found = core(MultiHead(), c_q[:, rows], [x[:, rows] for x in c_kv], mask)
    torch.testing.assert_close(found, expected(c_q, c_kv, documents)[:, rows], **EXACT)


@pytest.mark.parametrize("size", [1, 2])
def test_a_mask_has_blocks_where_ranks_share_sequences(size):
    documents = Documents.find(NUMBERS)
    cp = SimpleNamespace(size=size, block_mask=lambda length, documents: BlockMask(0, size, length // size, documents))
    mask = CausalMask.on_rank(cp, S, documents)
    assert mask.documents is documents
    assert mask.blocks is None if size == 1 else (mask.blocks.length, mask.blocks.documents) == (S // 2, documents)
