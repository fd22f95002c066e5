"""ops/cuda.py, what models call on a GPU, against the references that they call on a CPU: values and gradients."""

import pytest
import torch

from megatron_deepseek.ops import cuda, permute, rope
from megatron_deepseek.ops import cross_entropy as losses
from megatron_deepseek.ops.fp8 import (
    dequantize_1x128,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x1,
    quantize_128x128,
)
from megatron_deepseek.ops.fp8_gemm import grouped_scaled_mm, grouped_scaled_mm_wgrad, scaled_mm
from megatron_deepseek.ops.registry import Choice

BF16 = {"rtol": 2**-7, "atol": 2**-7}  # each side rounds sums of a few numbers of the order of one


def leaf(*shape: int, device) -> torch.Tensor:
    return torch.randn(*shape, device=device).bfloat16().requires_grad_()


def same(ours, reference, inputs, *args, tolerance=BF16):
    """Results and the inputs' gradients for a random upstream gradient."""
    got, expected = ours(*inputs, *args), reference(*inputs, *args)
    got, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected))
    upstream = [torch.randn_like(y) for y in got]
    pairs = [*zip(got, expected), *zip(torch.autograd.grad(got, inputs, upstream),
                                       torch.autograd.grad(expected, inputs, upstream))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, **tolerance)


def test_rope(device):
    table = torch.randn(2, 6, 4, device=device)
    same(cuda.turn_tail, rope.turn_tail.reference, (leaf(2, 6, 3, 24, device=device),), table, 16)
    heads, shared = leaf(2, 6, 3, 40, device=device), leaf(2, 6, 8, device=device)
    same(cuda.join_keys, rope.join_keys.reference, (heads, shared), table, 16)
    same(cuda.join_keys, rope.join_keys.reference, (heads, shared), None, 16)


def test_rope_of_a_view(device):
    """Rows of a wider tensor, at an odd place: copied first."""
    wide = leaf(2, 6, 3, 25, device=device)
    table = torch.randn(2, 6, 4, device=device)
    same(lambda x: cuda.turn_tail(x[..., 1:], table, 16), lambda x: rope.turn_tail.reference(x[..., 1:], table, 16),
         (wide,))


def test_permutations(device):
    experts_TK = torch.rand(20, 8, device=device).topk(3, -1).indices
    ours, reference = cuda.sort_by_expert(experts_TK, 8), permute.sort_by_expert.reference(experts_TK, 8)
    assert all(torch.equal(a.long(), b) for a, b in zip(ours, reference))
    order_R, inverse_R, _ = ours
    same(cuda.copy_and_permute, permute.copy_and_permute.reference, (leaf(20, 24, device=device),), order_R, inverse_R)
    same(cuda.permute, permute.permute.reference, (leaf(60, 24, device=device),), order_R, inverse_R)
    same(lambda y, w: cuda.weighted_sum(y, w, order_R, inverse_R),
         lambda y, w: permute.weighted_sum.reference(y, w, order_R, inverse_R),
         (leaf(60, 24, device=device), torch.rand(20, 3, device=device, requires_grad=True)),
         tolerance={"rtol": 2**-6, "atol": 0.05})  # the reference rounds the weights to bfloat16


def test_cross_entropy(device):
    """A label of another rank, and the gradient in place."""
    logits, labels = leaf(4, 40, device=device).detach() * 3, torch.tensor([10, 49, 5, 20], device=device)
    ours, reference = (f(logits, labels, 10) for f in (
        cuda.cross_entropy_statistics, losses.cross_entropy_statistics.reference))
    for a, b in zip(ours, reference):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    grad = torch.rand(4, device=device)
    expected = losses.cross_entropy_gradient.reference(logits, labels, 10, *reference[:2], grad)
    got = cuda.cross_entropy_gradient(logits, labels, 10, *ours[:2], grad)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
    assert got.data_ptr() == logits.data_ptr()


def test_what_kernels_do_not_take(device):
    """float64, widths of no multiple of 16 bytes: the reference's."""
    assert cuda.turn_tail(torch.zeros(1, 1, 1, 24, device=device), None, 16) is NotImplemented
    assert cuda.quantize_1x128(torch.zeros(2, 12, device=device)) is NotImplemented
    assert cuda.permute(torch.zeros(2, 3, device=device), None, None) is NotImplemented
    assert cuda.scaled_mm(torch.zeros(0, 16, device=device), None, None, None) is NotImplemented


@pytest.fixture
def ours_in_use(monkeypatch):
    monkeypatch.setattr(cuda, "choices", lambda: {"grouped_scaled_mm_wgrad": Choice("", "csrc", "")})


def close(got, expected, bound=2**-8):
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert got.shape == expected.shape and error < bound, float(error)


def test_linear_of_three_products(device):
    """Forward, dgrad and wgrad as training calls them, M and K no multiples of 128."""
    x, grad, w = (torch.randn(*shape, device=device).bfloat16() for shape in ((150, 80), (150, 200), (200, 80)))
    x_q, g_q, w_q = cuda.quantize_1x128(x.view(3, 50, 80)), cuda.quantize_1x128(grad), cuda.quantize_128x128(w)
    x_tiles = x_q[0].view(150, 80), x_q[1].view(150, 1)
    close(cuda.scaled_mm(*x_tiles, *w_q), scaled_mm(*quantize_1x128(x), *quantize_128x128(w)))
    expected = scaled_mm(*quantize_1x128(grad), *(part.mT for part in quantize_128x128(w)))
    close(cuda.scaled_mm(*g_q, *cuda.transposed_blocks(w)), expected)
    close(cuda.scaled_mm(*g_q, *(part.mT for part in w_q)), expected)
    close(cuda.scaled_mm(*cuda.quantize_128x1(grad), *cuda.quantize_128x1(x)),
          dequantize_1x128(*quantize_1x128(grad.t())) @ dequantize_1x128(*quantize_1x128(x.t())).t())


def test_experts_of_three_products(device, ours_in_use):
    counts = [70, 0, 150]
    x, grad, w = (torch.randn(*shape, device=device).bfloat16() for shape in ((220, 80), (220, 136), (3, 136, 80)))
    x_q, g_q, w_q = quantize_1x128(x), quantize_1x128(grad), quantize_128x128(w)
    close(cuda.grouped_scaled_mm(*x_q, *w_q, counts), grouped_scaled_mm(*x_q, *w_q, counts))
    transposed = tuple(part.mT.contiguous() for part in w_q)
    close(cuda.grouped_scaled_mm(*g_q, *cuda.transposed_blocks(w), counts), grouped_scaled_mm(
        *g_q, *transposed, counts))
    columns = [cuda.quantize_128x1(t, False, counts) for t in (grad, x)]
    got = cuda.grouped_scaled_mm_wgrad(*columns[0], *columns[1], counts)
    references = [quantize_128x1(t, False, counts) for t in (grad, x)]
    close(got, grouped_scaled_mm_wgrad(*references[0], *references[1], counts))
    assert not got[1].any()


def test_swiglu_of_halves(device):
    hidden = torch.randn(2, 30, 48, device=device).bfloat16()
    gate, up = hidden.chunk(2, -1)
    q, s = cuda.quantize_swiglu(gate, up)
    close(dequantize_1x128(q, s), torch.nn.functional.silu(gate.float()) * up.float(), 0.04)  # E4M3: 2^-4 at most
    close(dequantize_128x128(*cuda.quantize_128x128(hidden[0])), hidden[0].float(), 0.04)
