"""ops/backends/cuda/, what models call on a GPU, against the references on a CPU: values and gradients."""

import pytest
import torch
from references import plain

from megatron_deepseek.ops.backends.cuda import gemm, layers, quantize
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled, plain as numbers_of
from megatron_deepseek.ops.fp8.encoding import dequantize_1x128, dequantize_128x128, quantize_128x1
from megatron_deepseek.ops.fp8.gemm import grouped_scaled_mm_wgrad

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
    same(layers.rope_queries, plain.rope_queries, (leaf(2, 6, 3, 24, device=device),), table, 16)
    heads, shared = leaf(2, 6, 3, 40, device=device), leaf(2, 6, 8, device=device)
    same(layers.assemble_keys, plain.assemble_keys, (heads, shared), table, 16)
    same(layers.assemble_keys, plain.assemble_keys, (heads, shared), None, 16)


def test_rope_of_a_view(device):
    """Rows of a wider tensor, at an odd place: copied first."""
    wide = leaf(2, 6, 3, 25, device=device)
    table = torch.randn(2, 6, 4, device=device)
    same(lambda x: layers.rope_queries(x[..., 1:], table, 16),
         lambda x: plain.rope_queries(x[..., 1:], table, 16),
         (wide,))


def test_permutations(device):
    experts_TK = torch.rand(20, 8, device=device).topk(3, -1).indices
    ours, reference = layers.sort_by_expert(experts_TK, 8), plain.sort_by_expert(experts_TK, 8)
    assert all(torch.equal(a.long(), b) for a, b in zip(ours, reference))
    order_R, inverse_R, _ = ours
    same(layers.copy_and_permute, plain.copy_and_permute, (leaf(20, 24, device=device),), order_R, inverse_R)
    same(layers.permute, plain.permute, (leaf(60, 24, device=device),), order_R, inverse_R)
    same(lambda y, w: layers.weighted_sum(y, w, order_R, inverse_R),
         lambda y, w: plain.weighted_sum(y, w, order_R, inverse_R),
         (leaf(60, 24, device=device), torch.rand(20, 3, device=device, requires_grad=True)),
         tolerance={"rtol": 2**-6, "atol": 0.05})  # the reference rounds the weights to bfloat16


@pytest.mark.parametrize("in_tiles", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_permutations_of_tiles(device, copies, in_tiles):
    """Codes and scales are moved; the gradient comes in numbers or in tiles."""
    order_R, inverse_R, _ = plain.sort_by_expert(torch.rand(20, 8, device=device).topk(3, -1).indices, 8)
    ours, reference = ((layers.permute, plain.permute), (layers.copy_and_permute, plain.copy_and_permute))[copies > 1]
    x = BlockScaled(*plain.quantize_1x128(torch.randn(60 // copies, 160, device=device).bfloat16(), True),
                    torch.bfloat16).requires_grad_()
    got, expected = (f(x, order_R, inverse_R) for f in (ours, reference))
    assert torch.equal(got.q.view(torch.uint8), expected.q.view(torch.uint8)) and torch.equal(got.scale, expected.scale)
    upstream = torch.randn(60, 160, device=device).bfloat16()
    if in_tiles:
        upstream = BlockScaled(*plain.quantize_1x128(upstream, True), torch.bfloat16)
    mine, wanted = (torch.autograd.grad(y, x, upstream)[0] for y in (got, expected))
    assert isinstance(mine, BlockScaled) == isinstance(wanted, BlockScaled) == (in_tiles and copies == 1)
    torch.testing.assert_close(*(numbers_of(grad) for grad in (mine, wanted)), **BF16)


def test_cross_entropy(device):
    """A label of another rank, and the gradient in place."""
    logits, labels = leaf(4, 40, device=device).detach() * 3, torch.tensor([10, 49, 5, 20], device=device)
    ours, reference = (f(logits, labels, 10) for f in (
        layers.cross_entropy_statistics, plain.cross_entropy_statistics))
    for a, b in zip(ours, reference):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    grad = torch.rand(4, device=device)
    expected = plain.cross_entropy_gradient(logits, labels, 10, *reference[:2], grad)
    got = layers.cross_entropy_gradient(logits, labels, 10, *ours[:2], grad)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
    assert got.data_ptr() == logits.data_ptr()


def test_what_kernels_do_not_take(device):
    """float32 of layers, float64, widths of no multiple of 16 bytes, nothing to multiply: the reference's."""
    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16, leaf: bool = False) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device, requires_grad=leaf)

    fp32, chosen = torch.float32, torch.zeros(2, 2, dtype=torch.int64, device=device)
    refused = [
        layers.rope_queries(zeros(1, 1, 1, 24, dtype=fp32), None, 16),
        layers.rope_queries(zeros(1, 1, 1, 24), None, 12), layers.rope_queries(zeros(1, 1, 1, 28), None, 16),
        layers.assemble_keys(zeros(1, 1, 1, 24), zeros(1, 1, 12), None, 16),
        layers.permute(zeros(2, 3), None, None), layers.permute(zeros(2, 8, dtype=fp32, leaf=True), None, None),
        layers.weighted_sum(zeros(2, 8, dtype=fp32), None, None, None),
        layers.sort_by_expert(chosen, 1025), layers.sort_by_expert(chosen.int(), 2),
        layers.cross_entropy_statistics(zeros(2, 8, dtype=fp32), None, 0),
        quantize.quantize_1x128(zeros(2, 12)), quantize.quantize_1x128(zeros(2, 16, dtype=torch.float64)),
        quantize.quantize_swiglu(zeros(2, 12), zeros(2, 12)),
        quantize.norm_quantize(zeros(2, 16, dtype=fp32), None, 0, True),
        quantize.dequantize_e5m6(zeros(2, 24), None, 16, torch.float16),
        gemm.scaled_mm(zeros(0, 16), None, None, None), gemm.scaled_mm(zeros(16, 0), None, None, None),
        gemm.scaled_mm(zeros(16, 16), None, None, None, torch.float64)]
    assert all(result is NotImplemented for result in refused), refused


def test_gate_and_up_of_two_tensors(device):
    """Whose rows are not equally far apart: copied first."""
    gate = torch.randn(30, 96, device=device).bfloat16()[:, 16:64]
    up = torch.randn(30, 48, device=device).bfloat16()
    codes_close(quantize.quantize_swiglu(gate, up), plain.quantize_swiglu(gate, up, False))


def test_a_second_backward_of_the_loss_is_an_error(device):
    """The first one wrote its gradient over the logits."""
    logits, labels = 2 * leaf(4, 40, device=device), torch.tensor([1, 2, 3, 4], device=device)
    top, total, _ = plain.cross_entropy_statistics(logits.detach(), labels, 0)
    keeps_them = logits * logits
    layers.cross_entropy_gradient(logits.detach(), labels, 0, top, total, torch.ones(4, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        keeps_them.sum().backward()


def close(got, expected, bound=2**-8):
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert got.shape == expected.shape and error < bound, float(error)


def test_linear_of_three_products(device):
    """Forward, dgrad and wgrad as training calls them, M and K no multiples of 128."""
    x, grad, w = (torch.randn(*shape, device=device).bfloat16() for shape in ((150, 80), (150, 200), (200, 80)))
    x_q, g_q = quantize.quantize_1x128(x.view(3, 50, 80)), quantize.quantize_1x128(grad)
    w_q = quantize.quantize_128x128(w)
    x_tiles = x_q[0].view(150, 80), x_q[1].view(150, 1)
    expected = plain.scaled_mm(*plain.quantize_1x128(x), *plain.quantize_128x128(w))
    for form in (gemm.scaled_mm, gemm.scaled_mm_tma_store, gemm.scaled_mm_clusters, gemm.scaled_mm_clusters_tma_store):
        close(form(*x_tiles, *w_q), expected)
    expected = plain.scaled_mm(*plain.quantize_1x128(grad), *(part.mT for part in plain.quantize_128x128(w)))
    close(gemm.scaled_mm(*g_q, *quantize.quantize_both_ways(w)[1]), expected)
    close(gemm.scaled_mm(*g_q, *(part.mT for part in w_q)), expected)
    close(gemm.scaled_mm(*quantize.quantize_128x1(grad), *quantize.quantize_128x1(x)),
          dequantize_1x128(*plain.quantize_1x128(grad.t())) @ dequantize_1x128(*plain.quantize_1x128(x.t())).t())


@pytest.mark.parametrize("counts, tall", [([70, 0, 150], True), ([300, 10, 10], False)])
def test_experts_of_three_products(device, counts, tall):
    assert gemm.worth_tall_tiles(counts) == tall
    rows = sum(counts)
    x, grad, w = (torch.randn(*shape, device=device).bfloat16() for shape in ((rows, 80), (rows, 136), (3, 136, 80)))
    x_q, g_q, w_q = plain.quantize_1x128(x), plain.quantize_1x128(grad), plain.quantize_128x128(w)
    expected = plain.grouped_scaled_mm(*x_q, *w_q, counts)
    for form in (gemm.grouped_scaled_mm, gemm.grouped_scaled_mm_tma_store, gemm.grouped_scaled_mm_clusters,
                 gemm.grouped_scaled_mm_clusters_tma_store):
        close(form(*x_q, *w_q, counts), expected)
    transposed = tuple(part.mT.contiguous() for part in w_q)
    close(gemm.grouped_scaled_mm(*g_q, *quantize.quantize_both_ways(w)[1], counts), plain.grouped_scaled_mm(
        *g_q, *transposed, counts))
    columns = [quantize.quantize_128x1(t, False, counts) for t in (grad, x)]
    references = [plain.quantize_128x1(t, False, counts) for t in (grad, x)]
    for form in (gemm.grouped_scaled_mm_wgrad, gemm.grouped_scaled_mm_wgrad_clusters):
        got = form(*columns[0], *columns[1], counts)
        close(got, plain.grouped_scaled_mm_wgrad(*references[0], *references[1], counts))
        assert bool(got[1].any()) == (counts[1] > 0)


def codes_close(got, expected):
    """Tiles, or nested tuples of them: scales to bfloat16's step, codes but for a few that rounded the other way."""
    if isinstance(got[0], tuple):
        assert len(got) == len(expected)
        return [codes_close(*pair) for pair in zip(got, expected)]
    (q, scale), (expected_q, expected_scale) = got, expected
    assert q.shape == expected_q.shape and scale.shape == expected_scale.shape
    torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)
    assert (q.view(torch.uint8) != expected_q.view(torch.uint8)).float().mean() < 5e-3


def test_gradients_both_ways(device):
    x = torch.randn(150, 200, device=device).bfloat16()
    codes_close(quantize.quantize_rows_and_columns(x, True), plain.quantize_rows_and_columns(x, True))


@pytest.mark.parametrize("joint, width", [(True, 72), (True, 128), (False, 128)])
def test_swiglu_backward(device, joint, width):
    gate_up, grad = (torch.randn(150, size, device=device).bfloat16() for size in (2 * width, width))
    arguments = grad, *gate_up.chunk(2, -1), joint
    codes_close(quantize.swiglu_backward_tiles(*arguments), plain.swiglu_backward_tiles(*arguments))


@pytest.mark.parametrize("counts", [(), ([3, 0, 130],)])
def test_swiglu_backward_whose_tiles_are_not_of_each(device, counts):
    """72 columns of gate end within a tile of both side by side, so each gradient is quantised by itself."""
    grad, gate, up = (torch.randn(133, 72, device=device).bfloat16() for _ in range(3))
    got = quantize.swiglu_backward_tiles(grad, gate, up, False, *counts)
    expected = plain.swiglu_backward_tiles(grad, gate, up, False, *counts)
    if counts:  # kernels pad the tiles of groups
        got = tuple((rows, (without_padding(columns[0], *counts), columns[1])) for rows, columns in got)
    codes_close(got, expected)


def without_padding(q: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = q.view(torch.uint8).split([-(-count // 128) * 128 for count in counts], 1)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts)], 1).view(q.dtype)


@pytest.mark.parametrize("widths", [(80, 76), (76, 80), (76, 76)])
def test_wgrad_of_experts_with_a_width_of_no_multiple_of_8(device, widths):
    """Kernels do not quantise it, so the reference's columns, without padding, meet the kernel's."""
    counts = [70, 0, 150]
    operands = [torch.randn(220, width, device=device).bfloat16() for width in widths]
    got = grouped_scaled_mm_wgrad(*(part for x in operands for part in quantize_128x1(x, False, counts)), counts)
    columns = [part for x in operands for part in plain.quantize_128x1(x, False, counts)]
    close(got, plain.grouped_scaled_mm_wgrad(*columns, counts))


def test_products_of_halves_of_tiles(device):
    """dgrad and wgrad of gate and of up, which read the left and the right of one tensor."""
    gate_up, grad = (torch.randn(150, size, device=device).bfloat16() for size in (256, 128))
    weight, x = (torch.randn(*shape, device=device).bfloat16() for shape in ((128, 80), (150, 80)))
    ours, reference = (f(grad, *gate_up.chunk(2, -1), False) for f in (
        quantize.swiglu_backward_tiles, plain.swiglu_backward_tiles))
    for (rows, columns), (expected_rows, expected_columns) in zip(ours, reference):
        close(gemm.scaled_mm(*rows, *quantize.quantize_both_ways(weight)[1]),
              plain.scaled_mm(*expected_rows, *plain.quantize_128x128(weight.t())), 2**-7)
        close(gemm.scaled_mm(*columns, *quantize.quantize_128x1(x)),
              plain.scaled_mm(*expected_columns, *plain.quantize_128x1(x)), 2**-7)


@pytest.mark.parametrize("keep", [False, True])
def test_norm(device, keep):
    x, weight = torch.randn(3, 50, 72, device=device).bfloat16(), torch.rand(72, device=device).bfloat16()
    q, scale, rstd, y = quantize.norm_quantize(x, weight, 1e-6, keep)
    expected = plain.norm_quantize(x, weight, 1e-6, keep)
    codes_close((q, scale), expected[:2])
    torch.testing.assert_close(rstd, expected[2], rtol=1e-5, atol=0)
    assert y is None if not keep else torch.allclose(y.float(), expected[3].float(), rtol=2**-7)
    grad = torch.randn_like(x)
    got = quantize.norm_backward_quantize(grad, x, weight, rstd)
    expected = plain.norm_backward_quantize(grad, x, weight, rstd)
    codes_close(got[:2], expected[:2])
    torch.testing.assert_close(got[2].float(), expected[2].float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype, width", [(torch.uint8, 7168), (torch.float32, 56)])
def test_rows_of_codes_and_of_scales(device, dtype, width):
    x = torch.randint(200, (20, width), device=device).to(dtype)
    index = torch.randint(20, (70,), device=device)
    assert torch.equal(layers.gather_rows(x, index), x[index])


def test_rows_that_are_further_apart(device):
    """Gate and up, halves of a product's rows, are quantised where they are."""
    gate, up = torch.randn(30, 96, device=device).bfloat16().chunk(2, -1)
    for half in (gate, up):
        codes_close(quantize.quantize_1x128(half), plain.quantize_1x128(half))


def test_swiglu_of_halves(device):
    hidden = torch.randn(2, 30, 48, device=device).bfloat16()
    gate, up = hidden.chunk(2, -1)
    q, s = quantize.quantize_swiglu(gate, up)
    close(dequantize_1x128(q, s), torch.nn.functional.silu(gate.float()) * up.float(), 0.04)  # E4M3: 2^-4 at most
    close(dequantize_128x128(*quantize.quantize_128x128(hidden[0])), hidden[0].float(), 0.04)
