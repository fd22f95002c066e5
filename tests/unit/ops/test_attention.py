"""Attention over parts of the keys, joined, against attention over all of them; zigzag's division of the work.

float64 sums in another order: EXACT. gradcheck compares with finite differences at its own tolerance.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_deepseek.ops import attention
from megatron_deepseek.ops.attention import (
    LogSumExpMerge,
    Scores,
    attend,
    attend_backward,
    attend_within_documents,
    plain_backward,
    plain_forward,
)
from megatron_deepseek.ops.documents import Documents, documents_of
from megatron_deepseek.parallel.block_mask import BlockMask, visible
from megatron_deepseek.parallel.context import zigzag

EXACT = {"rtol": 1e-12, "atol": 1e-13}
B, N, S, K, D, V = 2, 3, 5, 8, 6, 4


def inputs():
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in ((B, N, S, D), (B, N, K, D), (B, N, K, V))]


def dense(q, k, v, mask_BSK: torch.Tensor) -> torch.Tensor:
    """Softmax attention with all its scores, a query without keys giving zero."""
    logits = (q @ k.mT * 0.3).masked_fill(~mask_BSK.unsqueeze(1), float("-inf"))
    return logits.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, causal=True)], ids=["all", "causal"])
def test_kernel_against_the_definition(scores):
    q, k, v = inputs()
    if scores.causal:
        k, v = k[:, :, :S], v[:, :, :S]
    out, lse = plain_forward(q, k, v, scores)
    for found, expected in zip(attend(q, k, v, scores), (out, lse), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn(out.shape, dtype=torch.float64)
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
        joined = LogSumExpMerge.empty(q, V)
        for rows, keys in _InParts.PARTS:
            part = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], Scores(0.3))
            joined.add((slice(None), slice(None), rows), *part)
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
    torch.testing.assert_close(_InParts.apply(q, k, v), dense(q, k, v, mask[None]), **EXACT)
    assert gradcheck(_InParts.apply, (q, k, v))


class _FlashOfCuda:
    """In place of torch.ops.aten: what CUDA's flash kernel asks for (read in torch's flash_api.cpp); the plain result.

    It makes `grad` and `out` contiguous, but goes by `lse`'s address alone.
    """

    @staticmethod
    def _check(*tensors):
        widths = {x.shape[-1] for x in tensors}
        assert len(widths) == 1 and widths.pop() % 8 == 0 and all(x.stride(-1) == 1 for x in tensors)

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
        self._check(q, k, v)
        assert not dropout_p and not return_debug_mask
        return *plain_forward(q, k, v, Scores(scale, is_causal)), None, None

    def _scaled_dot_product_flash_attention_backward(self, grad, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k,
                                                     dropout_p, is_causal, philox_seed, philox_offset, *, scale):
        self._check(grad, q, k, v, out)
        assert (max_q, max_k) == (q.shape[2], k.shape[2]) and cum_seq_q is cum_seq_k is None and not dropout_p
        as_read = lse.as_strided(lse.shape, torch.empty(lse.shape).stride())
        return plain_backward(grad, q, k, v, out, as_read, Scores(scale, is_causal))


def test_cudas_kernel_is_given_what_it_asks_for(monkeypatch):
    """A slice of the rows has a log-sum-exp that is not contiguous; widths here are no multiples of 8."""
    monkeypatch.setattr(attention, "aten", _FlashOfCuda())
    monkeypatch.setattr(attention, "kernel_for", lambda q: (attention.cuda_forward, attention.cuda_backward))
    test_parts_join_exactly_forwards_and_backwards()


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


PACKINGS = {
    "one": [16], "tokens": [1] * 16, "uneven": [5, 1, 7, 3], "at the chunks": [4, 4, 8], "long second": [1, 15],
}


def numbered(*packings: list[int]) -> torch.Tensor:
    """[B, S]: the document of each token of rows that hold documents of these lengths."""
    return torch.stack([torch.arange(len(p)).repeat_interleave(torch.tensor(p)) for p in packings])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_see_every_causal_pair_of_a_document_once_and_no_other(size):
    """All packings as rows of one batch."""
    documents, length = numbered(*PACKINGS.values()), 16
    seen = torch.zeros(len(documents), length, length, dtype=torch.int64)
    positions = [zigzag(length, rank, size) for rank in range(size)]
    for rank, mine in enumerate(positions):
        block_mask = BlockMask(rank, size, length // size, Documents.find(documents))
        for owner, theirs in enumerate(positions):
            made, parts = block_mask.of(owner)
            for part in parts:
                assert made.start <= part.keys.start < part.keys.stop <= made.stop
                rows, keys = mine[part.rows], theirs[part.keys]
                block = torch.ones(len(rows), len(keys), dtype=torch.int64)
                seen[part.batch, rows.unsqueeze(1), keys] += block.tril() if part.causal else block
    assert torch.equal(seen, (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().long())


def test_within_documents_against_all_scores():
    """Output and gradients of a batch whose rows are packed differently."""
    documents = numbered([5, 1, 7, 3], [16], [1] * 16)
    q, k, v = (torch.randn(3, N, 16, width, dtype=torch.float64, requires_grad=True) for width in (D, D, D))
    mask = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril()
    found, expected = attend_within_documents(q, k, v, Documents.find(documents), 0.3), dense(q, k, v, mask)
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn_like(expected)
    gradients, wanted = (torch.autograd.grad(each, (q, k, v), grad) for each in (found, expected))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operator gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *(t.numel() for t in tensors), 0)
        return result


def test_nothing_grows_with_the_square_of_a_packed_sequence():
    length = 256
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        attend_within_documents(q, k, v, Documents.find(numbered([16] * 16)), 0.3).sum().backward()
    assert length <= largest.elements < length**2 / 2


def test_a_document_in_two_places_is_refused():
    with pytest.raises(ValueError, match=r"not in one piece: \[0, 1, 0\]"):
        documents_of(torch.tensor([0, 0, 1, 0]))


def test_zigzag_refuses_uneven_chunks():
    with pytest.raises(ValueError, match="10 tokens .* 2 x 2 chunks"):
        zigzag(10, 0, 2)
