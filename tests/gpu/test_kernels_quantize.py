"""The quantising kernels against ops/fp8/encoding.py: the same codes and scales, bit for bit.

Where a kernel also makes what it quantises, exponentials and square roots of different libraries may differ in the
last place before a rounding: there a share of the codes may be one step off (`nearly`).
"""

import pytest
import torch
import torch.nn.functional as F
from references import plain

from megatron_deepseek.ops.backends.cuda.operands import tile_rows
from megatron_deepseek.ops.backends.kernels import operator
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.swiglu import swiglu, swiglu_backward

SHAPES = [(1, 8), (3, 128), (130, 136), (128, 256), (200, 520), (0, 64)]


def numbers(rows: int, columns: int, device) -> torch.Tensor:
    """Over many magnitudes, zeros and bfloat16's own extremes among them, tiles with nothing but zeros too."""
    x = torch.randn(rows, columns, device=device) * torch.exp2(torch.randint(-12, 12, (rows, 1), device=device))
    x[:, columns // 2] = 0
    if rows > 1:  # a single row keeps its numbers: of zeros alone every kernel is right
        x[rows // 2] = 0
    if rows > 2:
        x[1, :3] = torch.tensor([3e38, 1e-40, -1e-38], device=device)
    return x.bfloat16()


def codes(q: torch.Tensor) -> torch.Tensor:
    return q.view(torch.uint8)


def same(got, expected):
    (q, scale), (expected_q, expected_scale) = got, expected
    assert q.shape == expected_q.shape and scale.shape == expected_scale.shape
    assert torch.equal(scale.view(torch.int32) | 0, torch.where(expected_scale.isnan(), scale, expected_scale
                                                                ).view(torch.int32))
    assert torch.equal(scale.isnan(), expected_scale.isnan())
    assert torch.equal(codes(q), codes(expected_q))


def nearly(got, expected, share: float = 2e-3):
    """Scales to 2^-7, the step of bfloat16; at most `share` of the codes off, by one."""
    (q, scale), (expected_q, expected_scale) = got, expected
    torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)
    distance = (codes(q).int() - codes(expected_q).int()).abs()
    assert distance.max() <= 1 and (distance > 0).float().mean() <= share, (distance.max(), (distance > 0).sum())


def unpadded(result, rows: int):
    """Without the columns behind the last tile's rows, zeros but in a lost tile, which the reference does not have."""
    q, scale = result
    assert not codes(q[~scale.isnan().any(1), rows:]).any()
    return q[:, :rows], scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_rows(device, rows, columns, power_of_two, dtype):
    x = numbers(rows, columns, device).to(dtype)
    same(operator("quantize_rows")(x, power_of_two), plain.quantize_1x128(x, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_columns(device, rows, columns, power_of_two, any_order):
    x = numbers(rows, columns, device)
    expected = plain.quantize_128x1(x, power_of_two)
    same(unpadded(operator("quantize_columns")(x, None, power_of_two), rows), expected)
    q, s, q_columns, s_columns = operator("quantize_both")(x, None, power_of_two)
    same((q, s), plain.quantize_1x128(x, power_of_two))
    same(unpadded((q_columns, s_columns), rows), expected)


def tile_table(counts: list[int], device) -> torch.Tensor:
    return torch.tensor([tile[1:] for tile in tile_rows(counts)], dtype=torch.int32, device=device)


def ungrouped(result, counts):
    """Padded tiles of groups -> the reference's, one group right after the other."""
    q, scale = result
    parts, first = [], 0
    for count in counts:
        parts.append(q[:, first:first + count])
        first += -(-count // 128) * 128
    return torch.cat(parts, 1), scale


COUNTS = [[5, 0, 130, 128], [0, 0, 1], [256]]


@pytest.mark.parametrize("dtype, power_of_two", [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("counts", COUNTS)
def test_columns_of_groups(device, counts, dtype, power_of_two):
    x = numbers(sum(counts), 136, device).to(dtype)
    got = operator("quantize_columns")(x, tile_table(counts, device), power_of_two)
    same(ungrouped(got, counts), plain.quantize_128x1(x, power_of_two, counts))


def test_more_tiles_than_a_grid_has_rows(device):
    """65,535 on a GPU, where groups of one row each are as many tiles; 256 in the emulation."""
    counts = [1] * (65536 if device.type == "cuda" else 260)
    x = numbers(len(counts), 136, device)
    got = operator("quantize_both")(x, tile_table(counts, device), False)
    same(got[:2], plain.quantize_1x128(x))
    assert torch.equal(codes(got[2]).view(136, -1, 128)[..., 0].t(), codes(plain.quantize_1x128(x.view(-1, 1))[0]
                                                                            ).view(-1, 136))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_retile(device, counts, power_of_two):
    q, scale = plain.quantize_1x128(numbers(sum(counts), 264, device), power_of_two)
    got = operator("retile_columns")(q, scale, tile_table(counts, device), power_of_two)
    same(ungrouped(got, counts), plain.retile_128x1(q, scale, power_of_two, counts))


def test_retile_of_every_code(device):
    """In tiles of three rows; where a code is NaN, which no tile of ours is alone, the new tile is lost too."""
    code = torch.arange(256, dtype=torch.uint8, device=device)
    q = torch.stack([code, code.flip(0), code.roll(77)]).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25, 3.0]] * 3, device=device)
    expected = plain.retile_128x1(q, scale)
    assert expected[1].isnan().sum() == 6
    same(unpadded(operator("retile_columns")(q, scale, None, False), 3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8), (130, 136), (3, 200, 264)])
def test_blocks(device, shape, dtype, any_order):
    w = numbers(shape[-2] * (shape[0] if len(shape) == 3 else 1), shape[-1], device).view(shape).to(dtype)
    q, s, q_t, s_t = operator("quantize_blocks")(w, True, False)
    same((q, s), plain.quantize_128x128(w))
    expected_q, expected_s = plain.quantize_128x128(w.mT)
    assert not codes(q_t[..., shape[-2]:]).any()
    same((q_t[..., :shape[-2]].contiguous(), s_t), (expected_q, expected_s))
    alone = operator("quantize_blocks")(w, False, False)
    same(alone[:2], (q, s))
    assert alone[2].numel() == 0 and alone[3].numel() == 0


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("largest", [2.0**-117, 2.0**-120, 2.0**-126, 2.0**-133])
def test_tiles_of_the_smallest_numbers(device, largest, power_of_two):
    """Below 448 * 2^-126 the scale stays 2^-126, and codes lose what bfloat16's subnormals still have."""
    x = (torch.rand(130, 136, device=device) * 2 - 1).mul_(largest).bfloat16()
    same(operator("quantize_rows")(x, power_of_two), plain.quantize_1x128(x, power_of_two))
    same(operator("quantize_blocks")(x, False, power_of_two)[:2], plain.quantize_128x128(x, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_number_loses_its_tile(device, broken, power_of_two):
    x = numbers(130, 264, device)
    x[129, 200] = broken
    same(operator("quantize_rows")(x, power_of_two), plain.quantize_1x128(x, power_of_two))
    columns = plain.quantize_128x1(x, power_of_two)
    same(unpadded(operator("quantize_columns")(x, None, power_of_two), 130), columns)
    both = operator("quantize_both")(x, None, power_of_two)
    same(both[:2], plain.quantize_1x128(x, power_of_two))
    same(unpadded(both[2:], 130), columns)
    same(operator("quantize_blocks")(x, False, power_of_two)[:2], plain.quantize_128x128(x, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows, half", [(1, 8), (130, 136), (64, 256)])
def test_swiglu(device, rows, half, power_of_two):
    gate_up = (2 * torch.randn(rows, 2 * half, device=device)).bfloat16()
    parts, activation = gate_up.chunk(2, -1), swiglu(*gate_up.chunk(2, -1))
    nearly(operator("swiglu_quantize_rows")(*parts, power_of_two), plain.quantize_1x128(activation, power_of_two))
    nearly(unpadded(operator("swiglu_quantize_columns")(*parts, None, power_of_two), rows),
           plain.quantize_128x1(activation, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows, half", [(1, 8), (130, 136), (64, 256)])
def test_swiglu_backward(device, rows, half, power_of_two):
    gate_up = (2 * torch.randn(rows, 2 * half, device=device)).bfloat16().requires_grad_()
    grad = torch.randn(rows, half, device=device).bfloat16()
    (expected,) = torch.autograd.grad(swiglu(*gate_up.chunk(2, -1)), gate_up, grad)
    q, s, q_columns, s_columns = operator("swiglu_backward_quantize")(
        grad, *gate_up.detach().chunk(2, -1), None, power_of_two)
    nearly((q, s), plain.quantize_1x128(expected, power_of_two))
    nearly(unpadded((q_columns, s_columns), rows), plain.quantize_128x1(expected, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("counts", [None, [5, 0, 130]])
def test_swiglu_of_kept_tiles(device, counts, power_of_two):
    """As of the numbers that the tiles stand for, rounded to bfloat16: the same kernels' results, bit for bit."""
    grad, gate, up = ((2 * torch.randn(135, 136, device=device)).bfloat16() for _ in range(3))
    kept = [plain.quantize_1x128(x) for x in (gate, up)]
    numbers = [encoding.dequantize_1x128(*tiles, torch.bfloat16) for tiles in kept]
    parts = [part for tiles in kept for part in tiles]
    table = None if counts is None else tile_table(counts, device)
    got = operator("kept_swiglu_quantize_columns")(*parts, table, power_of_two)
    same(got, operator("swiglu_quantize_columns")(*numbers, table, power_of_two))
    nearly(ungrouped(got, counts or [135]), plain.quantize_swiglu_columns(*numbers, power_of_two, counts))
    got = operator("kept_swiglu_backward_quantize")(grad, *parts, table, power_of_two)
    expected = operator("swiglu_backward_quantize")(grad, *numbers, table, power_of_two)
    same(got[:2], expected[:2])
    same(got[2:], expected[2:])
    gradients = torch.cat(swiglu_backward(grad, *numbers), -1)
    nearly(got[:2], plain.quantize_1x128(gradients, power_of_two))
    nearly(ungrouped(got[2:], counts or [135]), plain.quantize_128x1(gradients, power_of_two, counts))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows, columns", [(1, 8), (130, 136), (3, 7168)])
def test_norm(device, rows, columns, power_of_two):
    """The kernel's own formula is that of ops/norm.py's CPU form. In every other row eps is a tenth of the mean."""
    x, weight = (3 * torch.randn(rows, columns, device=device)).bfloat16(), torch.rand(columns, device=device) + 0.5
    x[::2] *= 2.0**-10
    normed = plain.rms_norm(x.cpu(), weight.cpu(), 1e-6).to(device)
    q, s, rstd, kept = operator("norm_quantize_rows")(x, weight, 1e-6, True, power_of_two)
    nearly((q, s), plain.quantize_1x128(normed, power_of_two))
    torch.testing.assert_close(kept, normed, rtol=2**-7, atol=0)
    torch.testing.assert_close(rstd, (x.double().square().mean(-1) + 1e-6).rsqrt().float(), rtol=1e-5, atol=0)
    assert operator("norm_quantize_rows")(x, weight, 1e-6, False, False)[3].numel() == 0


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows, columns", [(1, 8), (130, 136), (5, 2056)])
def test_norm_backward(device, rows, columns, power_of_two):
    """Against float64, rounded to bfloat16 once; the weight's sums of up to 130 float32 numbers: 1e-4."""
    x, grad = (torch.randn(rows, columns, device=device).bfloat16() for _ in range(2))
    weight = torch.rand(columns, device=device) + 0.5
    rstd = (x.float().square().mean(-1) + 1e-6).rsqrt()
    q, s, q_columns, s_columns, grad_weight = operator("norm_backward_quantize")(
        grad, x, weight, rstd, None, power_of_two)
    wide_x, wide_w = x.double().requires_grad_(), weight.double().requires_grad_()
    expected, expected_w = torch.autograd.grad(
        F.rms_norm(wide_x, (columns,), wide_w, 1e-6), (wide_x, wide_w), grad.double())
    nearly((q, s), plain.quantize_1x128(expected.bfloat16(), power_of_two))
    nearly(unpadded((q_columns, s_columns), rows), plain.quantize_128x1(expected.bfloat16(), power_of_two))
    torch.testing.assert_close(grad_weight.double(), expected_w, rtol=1e-4, atol=1e-4)
