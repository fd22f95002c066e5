"""Norm, SwiGLU, permutations and grouped products: gradcheck in float64, and against torch's own functions.

gradcheck compares with finite differences at its own tolerance. Against another formula of the same numbers, float64
differs by rounding alone: EXACT.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megatron_deepseek.ops import grouped_gemm as grouped_gemm_module
from megatron_deepseek.ops.copies import Copies, copy_rows, sort_choices, sum_copies
from megatron_deepseek.ops.grouped_gemm import grouped_dgrad, grouped_forward, grouped_gemm, grouped_wgrad
from megatron_deepseek.ops.norm import norm_forward, rms_norm
from megatron_deepseek.ops.permute import copy_and_permute, invert, permute, sum_rows, weighted_sum
from megatron_deepseek.ops.swiglu import swiglu

EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For a fixed random upstream gradient."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.autograd.grad(y, inputs, upstream.to(y.dtype))


def test_rms_norm_gradcheck():
    assert gradcheck(lambda x, w: rms_norm(x, w, 0.1), (doubles(2, 3, 5), doubles(5)))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_against_torch(eps):
    x, weight = doubles(3, 4, 16), doubles(16)
    got, expected = rms_norm(x, weight, eps), F.rms_norm(x, (16,), weight, eps)
    torch.testing.assert_close(got, expected, **EXACT)
    for a, b in zip(gradients(got, x, weight), gradients(expected, x, weight)):
        torch.testing.assert_close(a, b, **EXACT)


def test_rms_norm_of_zeros():
    """A row of zeros (a padding token) is normalised by eps: zeros, and finite gradients."""
    x, weight = torch.zeros(1, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    y = rms_norm(x, weight, 1e-6)
    y.sum().backward()
    assert not y.any() and torch.isfinite(x.grad).all() and not weight.grad.any()


def test_rms_norm_statistics_are_float32_under_bfloat16():
    """Within two roundings to bfloat16 (of the normalised input, then of the product) of the float64 result."""
    x, weight = torch.randn(64, 512).bfloat16(), torch.randn(512).bfloat16()
    expected = F.rms_norm(x.double(), (512,), weight.double(), 1e-6)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=2 * 2**-8, atol=0)


def test_rms_norm_is_rounded_before_its_weight():
    """As transformers does it: in bfloat16 that is not the same as after it."""
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    y, rstd = norm_forward(x, weight, 1e-6)
    assert torch.equal(y, (x.float() * rstd).bfloat16() * weight)
    assert not torch.equal(y, (x.float() * rstd * weight).bfloat16())


def test_swiglu_gradcheck_and_value():
    gate, up = doubles(4, 6), doubles(4, 6)
    assert gradcheck(swiglu, (gate, up))
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up, **EXACT)


def test_swiglu_of_the_halves_of_one_tensor():
    """As the experts call it: both inputs are views of one product, whose gradient is both halves'."""
    hidden = doubles(5, 8)
    got = gradients(swiglu(*hidden.chunk(2, -1)), hidden)[0]
    gate, up = hidden.chunk(2, -1)
    torch.testing.assert_close(got, gradients(F.silu(gate) * up, hidden)[0], **EXACT)


def routing(tokens: int, copies: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order of the copies by expert, and its inverse."""
    chosen = torch.stack([torch.randperm(experts)[:copies] for _ in range(tokens)])
    order = chosen.flatten().argsort(stable=True)
    return order, invert(order)


def test_invert():
    order, inverse = routing(6, 3, 5)
    assert torch.equal(order[inverse], torch.arange(18)) and torch.equal(inverse[order], torch.arange(18))


def test_permute():
    order, inverse = routing(6, 2, 5)
    x = doubles(12, 3)
    assert torch.equal(permute(x, order, inverse), x[order])
    assert gradcheck(lambda x: permute(x, order, inverse), (x,))


def test_copy_and_permute():
    order, inverse = routing(6, 3, 5)
    x = doubles(6, 4)
    got, expected = copy_and_permute(x, order, inverse), x.repeat_interleave(3, 0)[order]
    assert torch.equal(got, expected)
    torch.testing.assert_close(gradients(got, x)[0], gradients(expected, x)[0], **EXACT)
    assert gradcheck(lambda x: copy_and_permute(x, order, inverse), (x,))


def test_weighted_sum():
    order, inverse = routing(6, 3, 5)
    rows, weights = doubles(18, 4), doubles(6, 3)
    got = weighted_sum(rows, weights, order, inverse)
    unsorted = torch.zeros(18, 4, dtype=torch.float64).index_put((order,), rows)
    expected = (unsorted.view(6, 3, 4) * weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(got, expected, **EXACT)
    for a, b in zip(gradients(got, rows, weights), gradients(expected, rows, weights)):
        torch.testing.assert_close(a, b, **EXACT)
    assert gradcheck(lambda r, w: weighted_sum(r, w, order, inverse), (rows, weights))


def test_weighted_sum_undoes_copy_and_permute():
    order, inverse = routing(6, 3, 5)
    x = doubles(6, 4)
    third = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(weighted_sum(copy_and_permute(x, order, inverse), third, order, inverse), x, **EXACT)


def all_copies(tokens: int, copies: int, experts: int) -> Copies:
    """Every choice has a copy: no row is padded."""
    choices = sort_choices(torch.stack([torch.randperm(experts)[:copies] for _ in range(tokens)]), experts)
    return choices.cut(choices.counts.tolist())


def test_copies_of_every_choice():
    copies, x = all_copies(6, 3, 5), doubles(6, 4)
    got, expected = copy_rows(x, copies), x[copies.row_R]
    assert torch.equal(got, expected) and len(got) == sum(copies.counts) == 18
    torch.testing.assert_close(gradients(got, x)[0], gradients(expected, x)[0], **EXACT)
    assert gradcheck(lambda x: copy_rows(x, copies), (x,))


def test_weighted_sum_of_every_copy():
    copies, rows, weights = all_copies(6, 3, 5), doubles(18, 4), doubles(6, 3)
    got = sum_copies(rows, weights, copies)
    unsorted = torch.zeros(18, 4, dtype=torch.float64).index_put((copies.row_R * 3 + copies.choice_R,), rows)
    expected = (unsorted.view(6, 3, 4) * weights.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(got, expected, **EXACT)
    for a, b in zip(gradients(got, rows, weights), gradients(expected, rows, weights)):
        torch.testing.assert_close(a, b, **EXACT)
    assert gradcheck(lambda r, w: sum_copies(r, w, copies), (rows, weights))


def test_copies_of_no_tokens():
    """A rank that received none, whose number of copies nothing tells."""
    x, none = torch.empty(0, 4, requires_grad=True), torch.empty(0, dtype=torch.int64)
    copy_and_permute(x, none, none).sum().backward()
    assert x.grad.shape == (0, 4)


def test_no_tokens():
    """A rank whose slice of the batch is empty."""
    nothing = torch.empty(0, dtype=torch.int64)
    rows = copy_and_permute(torch.empty(0, 4, requires_grad=True), nothing, nothing)
    y = weighted_sum(rows, torch.empty(0, 3), nothing, nothing)
    assert rows.shape == (0, 4) and y.shape == (0, 4)


COUNTS = [[3, 2, 4], [0, 9, 0], [0, 0, 0], [4, 0, 5], [1, 1, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_gemm_by_loop(counts):
    x, weight = doubles(sum(counts), 5), doubles(3, 4, 5)
    got = grouped_gemm(x, weight, counts)
    expected = torch.cat([rows @ w.t() for rows, w in zip(x.split(counts), weight)])
    torch.testing.assert_close(got, expected, **EXACT)
    for a, b in zip(gradients(got, x, weight), gradients(expected, x, weight)):
        torch.testing.assert_close(a, b, **EXACT)


def test_grouped_gemm_gradcheck():
    assert gradcheck(lambda x, w: grouped_gemm(x, w, [2, 0, 3]), (doubles(5, 3), doubles(3, 2, 3)))


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_grouped_gemm_with_one_gradient(wanted):
    x, weight = doubles(5, 3), doubles(2, 4, 3)
    (weight if wanted == "x" else x).requires_grad_(False)
    grouped_gemm(x, weight, [2, 3]).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (wanted == "x", wanted == "weight")


def test_grouped_gemm_takes_a_gradient_that_is_not_contiguous():
    """A sum's gradient is an expanded scalar."""
    x, weight = doubles(5, 3), doubles(2, 4, 3)
    grouped_gemm(x, weight, [2, 3]).sum().backward()
    expected = torch.ones(5, 4, dtype=torch.float64)
    torch.testing.assert_close(weight.grad, grouped_wgrad(expected, x.detach(), [2, 3]), **EXACT)
    torch.testing.assert_close(x.grad, grouped_dgrad(expected, weight.detach(), [2, 3]), **EXACT)


def test_grouped_gemm_in_bfloat16():
    """float32 accumulation: within one rounding to bfloat16 of the float64 product, and a bit for the order."""
    x, weight = torch.randn(12, 64).bfloat16(), torch.randn(3, 8, 64).bfloat16()
    got = grouped_forward(x, weight, [5, 0, 7])
    expected = grouped_forward(x.double(), weight.double(), [5, 0, 7])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("counts", [*COUNTS, [70, 3, 130], [1, 64, 0]], ids=str)
def test_rows_of_other_experts_change_nothing(counts):
    """In bfloat16 on the CPU an expert's rows are rounded up by those behind them, of which no result may show."""
    rows, scale = sum(counts), 10.0 ** torch.arange(3).repeat_interleave(torch.tensor(counts)).unsqueeze(-1)
    x, weight, grad = (torch.randn(rows, 8) * scale).bfloat16(), torch.randn(3, 4, 8).bfloat16(), torch.randn(rows, 4)
    grad = grad.bfloat16()
    for product, operands in ((grouped_forward, (x, weight)), (grouped_dgrad, (grad, weight)),
                              (grouped_wgrad, (grad, x))):
        got, expected = product(*operands, counts), product(*(each.double() for each in operands), counts)
        torch.testing.assert_close(got.double(), expected, rtol=2**-6, atol=0.1)


def test_grouped_mm_leaves_no_gradient_to_experts_without_rows(monkeypatch):
    """A stand-in for CUDA's grouped_mm, which was seen to leave there what it found (pytorch issue 172439)."""
    def grouped_mm(a, b, offs):
        assert offs.dtype == torch.int32
        parts = zip(a.tensor_split(offs[:-1].long(), 1), b.tensor_split(offs[:-1].long()))
        return torch.stack([left @ right if len(right) else torch.full((8, 16), torch.nan) for left, right in parts])

    monkeypatch.setattr(grouped_gemm_module, "has_native_kernel", lambda x, *widths: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    grad, x, counts = torch.randn(5, 8), torch.randn(5, 16), [0, 2, 0, 3]
    got = grouped_wgrad(grad, x, counts)
    monkeypatch.undo()
    torch.testing.assert_close(got, grouped_wgrad(grad, x, counts))


def test_grouped_gemm_refuses_counts_that_do_not_add_up():
    with pytest.raises(AssertionError):
        grouped_gemm(torch.zeros(4, 3), torch.zeros(2, 5, 3), [1, 2])


def test_sums_of_rows_round_halves_to_even():
    """1 + 2^-8 is halfway between two bfloat16 numbers, the lower of which is even; a place behind the rows is none."""
    rows, places = torch.tensor([[1.0], [2**-8]]).expand(2, 8).bfloat16(), torch.tensor([[0, 1], [1, 2], [2, 2]])
    expected = torch.tensor([[1.0], [2**-8], [0.0]]).expand(3, 8)
    assert torch.equal(sum_rows(rows, places).float(), expected)
    assert torch.equal(sum_rows(rows.float(), places), torch.tensor([[1 + 2**-8], [2**-8], [0.0]]).expand(3, 8))
    assert torch.equal(sum_rows(rows[:0], torch.full((2, 2), 0)), torch.zeros(2, 8))
