"""NF4 against the paper's construction of its numbers, a case worked by hand, and bounds of its errors."""

import hashlib

import pytest
import torch

from megatron_deepseek.ops import nf4


def test_the_numbers_are_the_quantiles_that_the_paper_describes():
    """8 quantiles on the positive side, 7 on the negative, zero between; offset and code of QLoRA's authors.

    The paper prints float32 of float64 numbers that their scipy made; ndtri agrees to 1e-6.
    """
    offset = 0.9677083
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    torch.testing.assert_close(values / values.abs().max(), torch.tensor(nf4.VALUES, dtype=torch.float64), rtol=0,
                               atol=1e-6)


def test_a_block_by_hand():
    """The largest magnitude is 4, so x / 4 = 0.25, -1, 0.0398, 0: near 0.2461, -1, 0.0796 or 0, and 0."""
    row = torch.zeros(1, 64)
    row[0, :4] = torch.tensor([1.0, -4.0, 0.1592, 0.0])  # 0.0398 is above half of 0.0796, 0.03979
    row[0, 4] = 0.1591  # and this one below
    held = nf4.quantize(row)
    assert held.codes.shape == (1, 32) and held.scales.tolist() == [[4.0]]
    assert held.codes[0, :3].tolist() == [10 << 4 | 0, 8 << 4 | 7, 7 << 4 | 7]
    assert nf4.dequantize(held)[0, :6].tolist() == pytest.approx([4 * nf4.VALUES[10], -4, 4 * nf4.VALUES[8], 0, 0, 0])


@pytest.mark.parametrize("shape", [(3, 64), (5, 200), (2, 4, 130), (1, 1)])
def test_no_number_is_further_off_than_half_a_gap(shape):
    """The widest gap is between -1 and -0.696, so the error is at most 0.152 of the block's largest magnitude."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    held = nf4.quantize(x)
    again = nf4.dequantize(held)
    assert held.shape == again.shape == x.shape
    scales = held.scales.repeat_interleave(64, -1)[..., :x.shape[-1]]
    assert ((again - x).abs() <= 0.1520 * scales).all()
    largest = x.abs() == scales
    assert largest.sum() >= held.scales.numel() and (again[largest] == x[largest]).all()


def test_rows_are_independent():
    """So that a rank's rows are the whole weight's."""
    x = torch.randn(6, 192, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nf4.dequantize(nf4.quantize(x[2:4])), nf4.dequantize(nf4.quantize(x))[2:4])


def mixed_numbers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Cubes of numbers within +-1 that integer arithmetic mixes: the same bits everywhere."""
    mixed = (torch.arange(rows * columns) * 2654435761 + 12345) % (1 << 32)
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % (1 << 32)
    x = (((mixed ^ (mixed >> 13)) % (1 << 24)) - (1 << 23)).float() / (1 << 23)
    return (x**3).view(rows, columns).to(dtype)


# Of F.quantize_4bit(mixed_numbers(512, 1024, dtype), blocksize=64, quant_type="nf4") and F.dequantize_4bit of that, by
# bitsandbytes 0.50.2 on a CPU: the first digits of sha256 of codes, absmax and numbers.
BITSANDBYTES = {
    torch.float32: ("9d15b7aa9ba3c8e753401cb112be4c7d", "934ad93868c692d9f916ba2876e2a337",
                    "3d620d0cee2fddab3e52199eee7bb03f"),
    torch.bfloat16: ("c2f89877c8f06b3e5517d0c5d87a7085", "cc4826ee4366eaeb07cf7e54a2f8c5bd",
                     "fc4cf7fd64dc3bfe6424401fbe0d98dc")}


@pytest.mark.parametrize("dtype", BITSANDBYTES)
def test_bytes_are_those_of_bitsandbytes(dtype):
    held = nf4.quantize(mixed_numbers(512, 1024, dtype))
    found = (held.codes, held.scales, nf4.dequantize(held, dtype))
    assert tuple(hashlib.sha256(each.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
                 for each in found) == BITSANDBYTES[dtype]


@pytest.mark.parametrize("largest, number, code", [(7.0, "0x1.aefeacp-1", 9), (55.0, "0x1.a74c6ap+2", 8)])
def test_numbers_between_two_codes_round_as_in_bitsandbytes(largest, number, code):
    """It multiplies by the reciprocal of the largest; a division would give the other code of the two."""
    row = torch.zeros(1, 64)
    row[0, 0], row[0, 1] = largest, float.fromhex(number)
    assert nf4.quantize(row).codes[0, 0] == 15 << 4 | code


def test_double_scales():
    """E4M3 has steps of at most 1/16 of a number: the error of a scale is at most 1/32 + rounding of the largest
    distance from the mean of its row. 1 + 8 / b bytes each.
    """
    x = torch.randn(300, 1024, generator=torch.Generator().manual_seed(2)).mul_(torch.rand(300, 1) + 0.5)
    plain = nf4.quantize(x)
    double = plain.with_double_scales()
    assert plain.nbytes == x.numel() / 2 + 4 * 300 * 16 and double.nbytes == x.numel() / 2 + 300 * (16 + 8)
    before, after = plain.scales, double.plain_scales()
    assert after.shape == before.shape
    largest = (before - before.mean(1, keepdim=True)).abs().amax(1, keepdim=True)
    assert ((before - after).abs() <= largest / 28).all() and not torch.equal(before, after)
    assert torch.equal(nf4.dequantize(double), nf4.dequantize(nf4.Nf4(plain.codes, after, 1024)))


def test_double_scales_of_a_part_are_those_of_the_whole():
    """Rows of one rank, and columns of another whose rows were quantised as a whole."""
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(3))
    whole = nf4.quantize(x).with_double_scales()
    rows = nf4.quantize(x[2:5]).with_double_scales()
    assert torch.equal(nf4.dequantize(rows), nf4.dequantize(whole)[2:5])
    assert torch.equal(nf4.dequantize(whole.rows(1, 3).cut(slice(64, 192))), nf4.dequantize(whole)[1:3, 64:192])


def test_zeros_and_what_is_not_finite():
    assert not nf4.dequantize(nf4.quantize(torch.zeros(2, 70)).with_double_scales()).any()
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantize(torch.full((1, 64), torch.inf))
