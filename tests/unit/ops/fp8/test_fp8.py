"""FP8 quantisation and products: hand-worked tiles, every code, brute force in float64, and what odd inputs become."""

import pytest
import torch

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.ops.fp8 import e5m6, encoding
from megatron_deepseek.ops.fp8.gemm import grouped_scaled_mm, grouped_scaled_mm_wgrad, scaled_mm

SIZES = (1, 127, 128, 129, 300)
INF, NAN = float("inf"), float("nan")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers over many binary orders of magnitude, some of them zero."""
    exponents = torch.randint(-12, 12, shape, generator=generator(seed)).float()
    values = torch.randn(shape, generator=generator(seed + 1)) * exponents.exp2()
    return values * (torch.rand(shape, generator=generator(seed + 2)) > 0.1)


def codes(q: torch.Tensor) -> list[int]:
    return q.view(torch.uint8).flatten().tolist()


def nearest_even(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index in `table`, increasing float64 values from 0 on, of what |x| rounds to; ties to the even index."""
    magnitude = x.abs().double()
    above = torch.searchsorted(table, magnitude).clamp(1, len(table) - 1)
    low, high = magnitude - table[above - 1], table[above] - magnitude
    tie = torch.where(above % 2 == 0, above, above - 1)
    return torch.where(low < high, above - 1, torch.where(high < low, above, tie))


E4M3_TABLE = torch.arange(127, dtype=torch.uint8).view(encoding.E4M3).double()
E5M6_TABLE = torch.tensor([m * 2.0**-20 for m in range(64)] + [
    (1 + m / 64) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(64)], dtype=torch.float64)


def test_hand_worked_tile():
    """amax 896: scale 2. Halved: 448, -224, 0.5, 17 (between 16 and 18, to the even 16), 19 (between 18 and 20, to the
    even 20), 2^-9 the smallest subnormal, 2^-10 half of it (to 0), 1.5 * 2^-9 (between codes 1 and 2, to 2).
    """
    tile = torch.tensor([[896.0, -448.0, 1.0, 34.0, 38.0, 2.0**-8, 2.0**-9, 1.5 * 2.0**-8]])
    for power_of_two in (False, True):
        q, scale = encoding.quantize_1x128(tile, power_of_two)
        assert scale.tolist() == [[2.0]]
        assert q.float().tolist() == [[448, -224, 0.5, 16, 20, 2.0**-9, 0, 2.0**-8]]
        assert codes(q) == [0x7E, 0xF6, 0x30, 0x58, 0x5A, 1, 0, 2]


@pytest.mark.parametrize("amax, exact, power", [
    (448.0, 1.0, 1.0), (449.0, 449 / 448, 2.0), (447.0, 447 / 448, 1.0), (7.0, 2.0**-6, 2.0**-6), (0.0, 1.0, 1.0),
    (2.0**-118, 2.0**-126, 2.0**-126), (2.0**-140, 2.0**-126, 2.0**-126),
    (torch.finfo(torch.float32).max, torch.finfo(torch.float32).max / 448, 2.0**120)])
def test_scales(amax, exact, power):
    """The quotient in float32, rounded up to a power of two where asked; never subnormal, 1 for zeros."""
    value = torch.tensor([amax])
    assert encoding.tile_scales(value).item() == torch.tensor(exact).item()
    assert encoding.tile_scales(value, power_of_two=True).item() == power


def test_subnormal_input():
    """Scale 2^-126: 2^-120 is 64 of it, 2^-135 a 2^-9 of it, 2^-149 nothing."""
    q, scale = encoding.quantize_1x128(torch.tensor([[2.0**-120, -(2.0**-135), 2.0**-149]]))
    assert scale.item() == 2.0**-126 and q.float().tolist() == [[64.0, -(2.0**-9), 0.0]]


@pytest.mark.parametrize("bad", [INF, -INF, NAN, -NAN])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_one_bad_value_loses_its_tile_and_no_other(bad, power_of_two):
    x = lively(2, 300)
    x[0, 130] = bad
    q, scale = encoding.quantize_1x128(x, power_of_two)
    assert scale.isnan().tolist() == [[False, True, False], [False] * 3]
    assert codes(q[0, 128:256]) == [0x7F] * 128
    assert q[0, :128].float().isfinite().all() and q[1].float().isfinite().all()
    assert encoding.dequantize_1x128(q, scale).isnan().sum() == 128
    packed, scale = e5m6.quantize_e5m6(x)
    assert scale.isnan().tolist() == [[False, True, False], [False] * 3]
    assert set(e5m6.unpack(packed)[0, 128:256].tolist()) == {0x7E0}


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("columns", SIZES)
def test_against_brute_force(rows, columns):
    """Every tile by itself in a loop, rounding by a search among all codes; edges are smaller tiles."""
    x = lively(rows, columns, seed=rows * 1000 + columns)
    for power_of_two in (False, True):
        for quantized, transposed, (height, width) in (
                (encoding.quantize_1x128(x, power_of_two), False, (1, 128)),
                (encoding.quantize_128x128(x, power_of_two), False, (128, 128)),
                (encoding.quantize_128x1(x, power_of_two), True, (128, 1))):
            q, scale = (part.t() if transposed else part for part in quantized)
            assert q.shape == x.shape and scale.shape == (-(-rows // height), -(-columns // width))
            spread = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
            amax = torch.stack([torch.stack([tile.abs().max() for tile in band.split(width, 1)])
                                for band in x.split(height)])
            expected = torch.where(amax == 0, 1.0, amax / 448)
            assert torch.equal(scale, expected.log2().ceil().exp2() if power_of_two else expected)
            scaled = (x / spread).clamp(-448, 448)
            assert torch.equal(q.float().abs().double(), E4M3_TABLE[nearest_even(scaled, E4M3_TABLE)])
            assert (q.float().sign() * x.sign() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_taken_as_float32(dtype):
    x = torch.randn(3, 200, generator=generator()).to(dtype)
    for a, b in zip(encoding.quantize_1x128(x), encoding.quantize_1x128(x.float())):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (2, 0, 300)])
def test_empty(shape):
    q, scale = encoding.quantize_1x128(torch.empty(shape))
    assert q.shape == shape and scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert encoding.dequantize_1x128(q, scale).shape == shape
    assert encoding.quantize_128x128(torch.empty(shape))[0].shape == shape


def test_inputs_are_left_alone():
    x = lively(128, 256)
    before = x.clone()
    for quantize in (encoding.quantize_1x128, encoding.quantize_128x128, encoding.quantize_128x1, e5m6.quantize_e5m6):
        quantize(x)
    assert torch.equal(x, before)


def test_decode_has_every_code():
    every = torch.arange(256, dtype=torch.uint8).view(encoding.E4M3)
    torch.testing.assert_close(encoding.decode(every), every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [256, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_accelerator_rounds_as_a_cpu_does(monkeypatch, dtype, size):
    """There narrower numbers are made without float32 ones; each code with scales of all magnitudes and a NaN."""
    q = torch.arange(256, dtype=torch.uint8).repeat(40, 1)[:, :size].view(encoding.E4M3)
    scale = torch.randn(40, 2, generator=generator()).abs() * torch.exp2(torch.arange(-30, 10).unsqueeze(1))
    scale[3] = torch.nan
    expected = encoding.dequantize_1x128(q, scale, dtype)
    exact = q.double() * scale.double().repeat_interleave(128, 1)[:, :size]
    torch.testing.assert_close(expected, exact.float().to(dtype), rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(encoding, "on_accelerator", lambda x: True)
    torch.testing.assert_close(encoding.dequantize_1x128(q, scale, dtype), expected, rtol=0, atol=0, equal_nan=True)


def test_powers_of_two_lose_nothing_when_quantised_again():
    """The scale may halve (an amax that rounded down to 224 of it), the values stay."""
    x = lively(64, 300)
    once = encoding.dequantize_1x128(*encoding.quantize_1x128(x, power_of_two=True))
    again = encoding.dequantize_1x128(*encoding.quantize_1x128(once.bfloat16(), power_of_two=True))
    assert torch.equal(once, again)


def test_retiling_is_quantisation_of_the_dequantised():
    q, scale = encoding.quantize_1x128(lively(200, 300), power_of_two=True)
    counts = [128, 0, 1, 71]
    columns, scales = encoding.retile_128x1(q, scale, True, counts)
    assert columns.shape == (300, 200) and scales.shape == (300, 3)
    for group, part, part_scale in zip(encoding.dequantize_1x128(q, scale).split(counts), columns.split(counts, 1),
                                       scales.split([1, 0, 1, 1], 1)):
        expected, expected_scale = encoding.quantize_128x1(group, True)
        assert torch.equal(part.float(), expected.float()) and torch.equal(part_scale, expected_scale)


def test_released_weights():
    """Blocks as in the released files, weight = fp8 * weight_scale_inv: they dequantise by that formula, and
    quantising what comes out gives the files back (a scale may move by one rounding of 448 * scale).
    """
    rows, columns = 300, 200
    q = lively(rows, columns).clamp(-448, 448).to(encoding.E4M3)
    q[::128, ::128] = torch.tensor(-448.0).to(encoding.E4M3)
    scale = torch.rand(3, 2, generator=generator()) * 1e-3 + 1e-5
    weight = block_fp8.dequantize(q, scale)
    for row, column in ((0, 0), (127, 128), (128, 127), (299, 199)):
        assert weight[row, column] == q[row, column].float() * scale[row // 128, column // 128]
    for module in (block_fp8.quantize, encoding.quantize_128x128):
        again, again_scale = module(weight)
        assert torch.equal(again.float(), q.float())
        torch.testing.assert_close(again_scale, scale, rtol=2**-23, atol=0)


def test_every_e5m6_code():
    """Half precision without its last four bits; packed, two codes are three bytes."""
    every = torch.arange(4096, dtype=torch.int32)
    values = e5m6.decode(every)
    finite = values.isfinite()
    assert torch.equal(values[finite & (values >= 0)].unique().double(), E5M6_TABLE)
    assert torch.equal(e5m6.encode(values[finite]), every[finite])
    assert torch.equal(e5m6.unpack(e5m6.pack(every)), every)
    assert e5m6.pack(torch.tensor([0x123, 0xABC, 0xFED])).tolist() == [0x23, 0xC1, 0xAB, 0xED, 0x0F, 0x00]


def test_e5m6_rounds_ties_to_even():
    """Steps are 2^-6 from 1 on, and 2^-20 among the subnormals: halves go to the even code, whatever the sign."""
    step, small = 2.0**-6, 2.0**-20
    x = torch.tensor([1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, small / 2, 3 * small / 2, -5 * small / 2])
    assert e5m6.decode(e5m6.encode(x)).tolist() == [1, 1 + 2 * step, -1, 0, 2 * small, -2 * small]


@pytest.mark.parametrize("size", [1, 128, 129, 301])
def test_e5m6_against_brute_force(size):
    x = lively(20, size) * torch.tensor(1e-3)
    packed, scale = e5m6.quantize_e5m6(x)
    assert packed.dtype == torch.uint8 and packed.shape == (20, 3 * -(-size // 2))
    spread = scale.repeat_interleave(128, -1)[:, :size]
    assert torch.equal(scale.log2(), scale.log2().round())
    restored = e5m6.dequantize_e5m6(packed, scale, size)
    assert torch.equal((restored / spread).abs().double(), E5M6_TABLE[nearest_even(x / spread, E5M6_TABLE)])
    largest = (x / spread).abs().view(20, -1).amax()
    assert 65024 / 2 < largest <= 65024


def test_e5m6_rounds_finer_than_e4m3():
    """Half a step is 2^-7 of a value against 2^-4, down to 2^-30 of the largest."""
    x = torch.randn(50, 256, generator=generator())
    error = (e5m6.dequantize_e5m6(*e5m6.quantize_e5m6(x), 256) - x).abs() / x.abs()
    assert error.max() <= 2**-7 and error.max() > 2**-8


@pytest.mark.parametrize("rows, columns, size", [(5, 7, 300), (129, 130, 128), (3, 300, 129), (1, 1, 1), (4, 3, 0)])
@pytest.mark.parametrize("blocks", [True, False])
def test_product_against_float64(rows, columns, size, blocks):
    """K float32 roundings of a sum, each at most 2^-24 of the sum of magnitudes; in float64 almost none."""
    a, b = lively(rows, size), lively(columns, size, seed=9)
    a_q, a_s = encoding.quantize_1x128(a)
    b_q, b_s = (encoding.quantize_128x128 if blocks else encoding.quantize_1x128)(b)
    a_spread = a_s.double().repeat_interleave(128, 1)[:, :size]
    b_spread = b_s.double().repeat_interleave(128, 0)[:columns] if blocks else b_s.double()
    left, right = a_q.double() * a_spread, b_q.double() * b_spread.repeat_interleave(128, 1)[:, :size]
    expected, magnitude = left @ right.t(), left.abs() @ right.abs().t()
    for dtype, unit in ((torch.float32, 2**-24), (torch.float64, 2**-53)):
        got = scaled_mm(a_q, a_s, b_q, b_s, dtype)
        assert got.dtype == dtype and got.shape == (rows, columns)
        assert ((got.double() - expected).abs() <= (size + 4) * unit * magnitude).all()
    assert torch.equal(scaled_mm(a_q, a_s, b_q, b_s), scaled_mm(a_q, a_s, b_q, b_s, torch.float32).bfloat16())


def test_hand_worked_product():
    """A block of 2^10 * 2^10 and 32 blocks of ones, whose 4096 an accumulator of 14 bits would not see beside 2^20."""
    x = torch.ones(1, 33 * 128)
    x[:, :128] = 0
    x[0, 0] = 1024
    tiles = encoding.quantize_1x128(x, power_of_two=True)
    assert tiles[1].tolist() == [[4.0] + [2.0**-8] * 32]
    assert scaled_mm(*tiles, *tiles, torch.float32).item() == 2**20 + 32 * 128


def test_bad_tile_reaches_the_results_that_it_enters():
    a, b = lively(3, 256), lively(300, 256)
    a[1, 200] = INF
    product = scaled_mm(*encoding.quantize_1x128(a), *encoding.quantize_128x128(b))
    assert product.isnan().any(1).tolist() == [False, True, False]
    a, b[290, 3] = lively(3, 256), NAN
    lost = scaled_mm(*encoding.quantize_1x128(a), *encoding.quantize_128x128(b)).isnan()
    assert lost[:, 256:].all() and not lost[:, :256].any()


@pytest.mark.parametrize("counts", [[130, 0, 1, 69], [0, 0, 200, 0], [0, 0, 0, 0]])
def test_groups_are_products_of_their_own(counts):
    rows, size, columns = sum(counts), 200, 140
    x, weight, grad = lively(rows, size), lively(4, columns, size, seed=5), lively(rows, columns, seed=7)
    forward = grouped_scaled_mm(*encoding.quantize_1x128(x), *encoding.quantize_128x128(weight), counts, torch.float32)
    wgrad = grouped_scaled_mm_wgrad(*encoding.quantize_128x1(grad, False, counts),
                                    *encoding.quantize_128x1(x, False, counts),
                                    counts, torch.float32)
    assert forward.shape == (rows, columns) and wgrad.shape == (4, columns, size)
    for e, (part, rows_of_grad) in enumerate(zip(x.split(counts), grad.split(counts))):
        alone = scaled_mm(*encoding.quantize_1x128(part), *encoding.quantize_128x128(weight[e]), torch.float32)
        assert torch.equal(forward.split(counts)[e], alone)
        if counts[e]:
            alone = scaled_mm(*encoding.quantize_128x1(rows_of_grad), *encoding.quantize_128x1(part), torch.float32)
            assert torch.equal(wgrad[e], alone)
        else:
            assert not wgrad[e].any()
