"""Attention over parts of the keys, joined, against attention over all of them; zigzag's division of the work.

float64 sums in another order: EXACT. gradcheck compares with finite differences at its own tolerance.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megatron_deepseek.ops.attention import (Joined, Scores, attend, attend_backward, plain_backward, plain_forward)
from megatron_deepseek.parallel.context import visible, zigzag

EXACT = {"rtol": 1e-12, "atol": 1e-13}
B, N, S, K, D, V = 2, 3, 5, 8, 6, 4


def inputs():
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in ((B, N, S, D), (B, N, K, D), (B, N, K, V))]


def some_mask() -> torch.Tensor:
    """With a query that sees no key at all, and one that sees only the second half."""
    mask = torch.rand(B, S, K, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, 1], mask[1, 2] = False, torch.arange(K) >= K // 2
    return mask


SCORES = [Scores(0.3), Scores(0.3, mask_BSK=some_mask())]


@pytest.mark.parametrize("scores", SCORES, ids=["all", "mask"])
def test_kernel_against_the_definition(scores):
    """Output and log-sum-exp, which is -inf where a query sees no key; gradients where every query sees one."""
    q, k, v = inputs()
    for found, expected in zip(attend(q, k, v, scores), plain_forward(q, k, v, scores), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    out, lse = plain_forward(q, k, v, scores)
    seen = lse.isfinite().unsqueeze(-1)
    grad = torch.randn(out.shape, dtype=torch.float64) * seen
    lse = lse.masked_fill(~lse.isfinite(), 0)  # what another part of the keys would have given
    for found, expected in zip(attend_backward(grad, q, k, v, out, lse, scores),
                               plain_backward(grad, q, k, v, out, lse, scores), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_definition_against_torch():
    q, k, v = inputs()
    k, v = k[:, :, :S], v[:, :, :S]
    out, lse = plain_forward(q, k, v, Scores(0.3, causal=True))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), **EXACT)
    torch.testing.assert_close(lse[:, :, 0], (q[:, :, 0] * k[:, :, 0]).sum(-1) * 0.3, **EXACT)


class _InParts(torch.autograd.Function):
    """The keys in two parts, the second seen by the later queries alone."""

    PARTS = ((slice(0, S), slice(0, 3)), (slice(2, S), slice(3, K)))

    @staticmethod
    def forward(ctx, q, k, v):
        joined = Joined.empty(q, V)
        for rows, keys in _InParts.PARTS:
            joined.add(rows, *attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], Scores(0.3)))
        ctx.save_for_backward(q, k, v, joined.out_BNSV, joined.lse_BNS)
        return joined.out_BNSV

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        totals = [torch.zeros_like(x) for x in (q, k, v)]
        for rows, keys in _InParts.PARTS:
            parts = attend_backward(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
                                    lse[:, :, rows], Scores(0.3))
            for total, part, index in zip(totals, parts, (rows, keys, keys), strict=True):
                total[:, :, index] += part
        return tuple(totals)


def test_parts_join_exactly_forwards_and_backwards():
    q, k, v = (x.requires_grad_() for x in inputs())
    mask = torch.ones(S, K, dtype=torch.bool)
    mask[:2, 3:] = False
    torch.testing.assert_close(_InParts.apply(q, k, v), plain_forward(q, k, v, Scores(0.3, mask_BSK=mask[None]))[0],
                               **EXACT)
    assert gradcheck(_InParts.apply, (q, k, v))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_zigzag_gives_every_position_and_every_causal_pair_once(size):
    """And the same number of pairs to each rank, but for the triangles' diagonals that all have."""
    length = 16
    positions = [zigzag(length, rank, size) for rank in range(size)]
    assert sorted(torch.cat(positions).tolist()) == list(range(length))
    seen, work = torch.zeros(length, length, dtype=torch.int64), []
    for rank, mine in enumerate(positions):
        before = seen.sum().item()
        for owner, theirs in enumerate(positions):
            rows, keys, causal = visible(owner, rank, length // size)
            block = torch.ones(len(mine[rows]), len(theirs[keys]), dtype=torch.int64)
            seen[mine[rows].unsqueeze(1), theirs[keys]] += block.tril() if causal else block
        work.append(seen.sum().item() - before)
    assert torch.equal(seen, torch.ones_like(seen).tril())
    assert len(set(work)) == 1


def test_zigzag_refuses_uneven_chunks():
    with pytest.raises(ValueError, match="10 tokens .* 2 x 2 chunks"):
        zigzag(10, 0, 2)
