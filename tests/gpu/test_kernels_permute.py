"""Routing, permutation and combination against argsort and indexing."""

import pytest
import torch

from megatron_deepseek.ops.backends.kernels import operator

# tokens, choices, experts, the first of which nobody chooses and the last everybody may
CASES = [(1, 1, 1), (7, 2, 3), (100, 8, 16), (300, 8, 1024), (700, 6, 64), (700, 6, 100), (700, 6, 300), (0, 4, 8)]


def choices(tokens: int, top_k: int, experts: int, device) -> torch.Tensor:
    scores = torch.rand(tokens, experts, device=device)
    scores[:, 0] -= float(experts > top_k)
    return scores.topk(top_k, -1).indices


@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("tokens, top_k, experts", CASES)
def test_route(device, tokens, top_k, experts, align, any_order):
    chosen = choices(tokens, top_k, experts, device)
    copy_of_slot, slot_of_copy, counts, offsets = operator("route")(chosen, experts, align)
    flat = chosen.flatten()
    expected = flat.bincount(minlength=experts)
    assert torch.equal(counts, expected.int())
    padded = -(-expected // align) * align
    assert offsets.tolist() == [0, *padded.cumsum(0).tolist()]
    assert torch.equal(copy_of_slot[copy_of_slot >= 0], flat.argsort(stable=True).int())
    starts = (offsets[:-1] - expected.cumsum(0) + expected).repeat_interleave(expected)
    places = torch.arange(flat.numel(), device=device) + starts
    assert torch.equal(slot_of_copy[flat.argsort(stable=True)], places.int())
    assert torch.equal(copy_of_slot[slot_of_copy.long()], torch.arange(flat.numel(), device=device).int())


def test_choices_without_a_slot(device):
    """What a rank does not serve: -1 in one direction, and nothing in the other."""
    chosen = torch.tensor([[0, 5], [-1, 1], [2, 0]], device=device)
    copy_of_slot, slot_of_copy, counts, _ = operator("route")(chosen, 2, 1)
    assert copy_of_slot.tolist() == [0, 5, 3, -1, -1, -1]
    assert slot_of_copy.tolist() == [0, -1, -1, 2, -1, 1]
    assert counts.tolist() == [2, 1]


def places(tokens, top_k, experts, align, device):
    copy_of_slot, slot_of_copy, *_ = operator("route")(choices(tokens, top_k, experts, device), experts, align)
    return copy_of_slot, slot_of_copy.view(tokens, top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("width", [16, 264 * 8, 8 * 1032])
def test_gather(device, dtype, width):
    copy_of_slot, slot_of_copy = places(9, 2, 4, 16, device)
    x = torch.randn(9, width, device=device).to(dtype)
    got = operator("gather_rows")(x, copy_of_slot, slot_of_copy).float()
    expected = x.float()[copy_of_slot.long().clamp(min=0) // 2] * (copy_of_slot >= 0).unsqueeze(1)
    assert torch.equal(got, expected)


def test_gather_backward(device):
    """Sums of three float32 numbers, rounded to bfloat16 once."""
    copy_of_slot, slot_of_copy = places(11, 3, 5, 8, device)
    x = torch.randn(11, 40, device=device).bfloat16().requires_grad_()
    grad = torch.randn(copy_of_slot.shape[0], 40, device=device).bfloat16()
    (got,) = torch.autograd.grad(operator("gather_rows")(x, copy_of_slot, slot_of_copy), x, grad)
    expected = grad.double()[slot_of_copy.long()].sum(1)
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("tokens, top_k, width", [(5, 1, 8), (13, 8, 72), (3, 2, 4096)])
def test_combine_with_weights(device, tokens, top_k, width):
    """float32 sums rounded to bfloat16 once; the weights' gradients are float32 sums of `width` products: 1e-5."""
    copy_of_slot, slot_of_copy = places(tokens, top_k, 9, 4, device)
    y = torch.randn(copy_of_slot.shape[0], width, device=device).bfloat16().requires_grad_()
    weights = torch.rand(tokens, top_k, device=device, requires_grad=True)
    out = operator("combine_rows")(y, copy_of_slot, slot_of_copy, weights)
    grad = torch.randn(tokens, width, device=device).bfloat16()
    grad_y, grad_weights = torch.autograd.grad(out, (y, weights), grad)
    wide_y, wide_w = (x.detach().double().requires_grad_() for x in (y, weights))
    expected = (wide_y[slot_of_copy.long()] * wide_w.unsqueeze(-1)).sum(1)
    expected_y, expected_w = torch.autograd.grad(expected, (wide_y, wide_w), grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(grad_y.double(), expected_y, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(grad_weights.double(), expected_w, rtol=1e-5, atol=1e-4)


def test_copies_without_a_slot_count_as_zero(device):
    chosen = torch.tensor([[0, 3], [3, 3]], device=device)
    copy_of_slot, slot_of_copy, *_ = operator("route")(chosen, 2, 1)
    y = torch.full((4, 8), float("nan"), device=device).bfloat16()
    y[0] = 2
    weights = torch.full((2, 2), 0.5, device=device)
    leaves = y.requires_grad_(), weights.requires_grad_()
    out = operator("combine_rows")(y, copy_of_slot, slot_of_copy.view(2, 2), weights)
    assert out.tolist() == [[1.0] * 8, [0.0] * 8]
    grad_y, grad_weights = torch.autograd.grad(out, leaves, torch.full_like(out, 3.0))
    assert grad_y.tolist() == [[1.5] * 8, *([[0.0] * 8] * 3)]
    assert grad_weights.tolist() == [[48.0, 0.0], [0.0, 0.0]]
