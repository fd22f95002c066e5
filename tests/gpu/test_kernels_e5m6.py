"""E5M6 against ops/fp8/e5m6.py: the same bytes, scales and numbers, bit for bit."""

import pytest
import torch
from references import plain

from megatron_deepseek.ops.backends.cuda.operands import tile_rows
from megatron_deepseek.ops.backends.kernels import operator

SHAPES = [(1, 8), (130, 136), (3, 2176)]


def numbers(rows: int, columns: int, device) -> torch.Tensor:
    """Over many magnitudes within a tile, where codes are subnormal, too; zeros, a row of them, ties, extremes."""
    x = torch.randn(rows, columns, device=device) * torch.exp2(
        torch.randint(-30, 12, (rows, columns), device=device).float())
    x[:, columns // 2] = 0
    if rows > 2:
        x[1] = 0
        x[2, :4] = torch.tensor([1 + 2**-7, 1 + 3 * 2**-7, -(2.0**-21), 3 * 2.0**-21], device=device)
        x[2, 4:128] = 0
        x[2, 4] = 65024
        x[0, :3] = torch.tensor([3e38, 1e-40, -1e-38], device=device)
    return x


def same(got, expected):
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.dtype == wanted.dtype
        bits = torch.int32 if mine.dtype == torch.float32 else mine.dtype
        assert torch.equal(mine.isnan(), wanted.isnan())
        assert torch.equal(mine.nan_to_num().view(bits), wanted.nan_to_num().view(bits))


def encoded(rows: int, columns: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    return plain.quantize_e5m6(numbers(rows, columns, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_quantize(device, rows, columns, dtype):
    x = numbers(rows, columns, device).to(dtype)
    same(operator("quantize_e5m6")(x), plain.quantize_e5m6(x))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_number_loses_its_tile(device, broken):
    x = numbers(3, 264, device)
    x[2, 200] = broken
    got = operator("quantize_e5m6")(x)
    same(got, plain.quantize_e5m6(x))
    lost = operator("dequantize_e5m6")(*got, True).isnan()
    assert lost[2, 128:256].all() and lost.sum() == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_dequantize(device, rows, columns, dtype):
    packed, scale = encoded(rows, columns, device)
    got = operator("dequantize_e5m6")(packed, scale, dtype == torch.float32)
    assert torch.equal(got, plain.dequantize_e5m6(packed, scale, columns, dtype))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("counts", [None, [5, 0, 130]])
def test_retile(device, counts, power_of_two):
    """128x1 tiles of E4M3; those of groups are padded to whole tiles."""
    packed, scale = encoded(135, 264, device)
    tiles = None if counts is None else torch.tensor(
        [tile[1:] for tile in tile_rows(counts)], dtype=torch.int32, device=device)
    q, s = operator("retile_e5m6")(packed, scale, tiles, power_of_two)
    expected_q, expected_s = plain.retile_e5m6(packed, scale, 264, power_of_two, counts)
    sizes = [135] if counts is None else counts
    parts = q.view(torch.uint8).split([-(-size // 128) * 128 for size in sizes], 1)
    assert torch.equal(torch.cat([part[:, :size] for part, size in zip(parts, sizes)], 1), expected_q.view(torch.uint8))
    assert torch.equal(s, expected_s)
