"""Block-scaled products against ops/fp8/gemm.py: dense, M-grouped, K-grouped.

The reference's operands are exact, so both differ by float32 sums of up to K products, and on a GPU by the 14 bits that
tensor cores keep within 128 of K: relative to the norm of the whole result 2^-12 there, 1e-6 emulated; results in
bfloat16 are rounded once more, 2^-8. Rows differ much in size, so each number is also held to the sum of its products'
magnitudes: 2^-9 of it there, 2^-18 emulated.
"""

from collections.abc import Callable

import pytest
import torch
from references import plain

from megatron_deepseek.ops.backends.cuda.operands import tile_rows
from megatron_deepseek.ops.backends.kernels import operator

HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="wgmma on E4M3 needs compute capability 9.0")


def magnitude(x):
    """Return codes without their signs; anything else as it is."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float8_e4m3fn:
        return x
    return (x.view(torch.uint8) & 0x7f).view(x.dtype)


def agree(got: torch.Tensor, product: Callable, operands: tuple) -> None:
    """Hold a result to that of a reference for the same operands, all arguments but the dtype."""
    assert got.dtype in (torch.float32, torch.bfloat16)
    expected = product(*operands, torch.float32).double()
    assert got.shape == expected.shape
    rounding = 2**-8 if got.dtype == torch.bfloat16 else 0
    size = expected.norm().clamp(min=1e-30)
    assert (got.double() - expected).norm() / size < (2**-12 if got.is_cuda else 1e-6) + rounding
    sums = product(*map(magnitude, operands), torch.float32).double()
    most = (2**-9 if got.is_cuda else 2**-18) * sums + rounding * expected.abs()
    assert ((got.double() - expected).abs() <= most).all()


def matrix(*shape: int, device) -> torch.Tensor:
    """Tiles of very different scales, so that a wrong one is seen."""
    x = torch.randn(*shape, device=device)
    return (x * torch.exp2(torch.randint(-6, 6, (*shape[:-1], 1), device=device).float())).bfloat16()


# The kernel's forms by its last three arguments: float32 results, or bfloat16 ones; stored by the copy engine (TMA), or
# from registers; blocks in clusters, or alone.
FORMS = pytest.mark.parametrize("form", [
    pytest.param((False, False, False), id="bfloat16"), pytest.param((True, False, False), id="float32"),
    pytest.param((False, True, False), id="tma_store"), pytest.param((True, False, True), id="clusters"),
    pytest.param((False, True, True), id="clusters_tma_store")])

CLUSTERS = pytest.mark.parametrize("clusters", [False, True], ids=["alone", "clusters"])


def operands_of(m: int, n: int, k: int, device) -> tuple[torch.Tensor, ...]:
    return (*plain.quantize_1x128(matrix(m, k, device=device)), *plain.quantize_128x128(matrix(n, k, device=device)))


@FORMS
@pytest.mark.parametrize("m, n, k", [(1, 8, 16), (128, 128, 128), (130, 136, 272), (257, 391, 144), (64, 640, 528)])
def test_dense(device, m, n, k, form):
    """The copy engine does not store rows of 391 numbers, which do not begin at multiples of 16 bytes."""
    operands = operands_of(m, n, k, device)
    agree(operator("scaled_mm")(*operands, *form), plain.scaled_mm, operands)


@FORMS
def test_bfloat16_is_float32_rounded_to_nearest(device, form):
    """Bit for bit, in every lane, as the sums are the same."""
    operands, (fp32, _, clusters) = operands_of(130, 136, 272, device), form
    got, wide = operator("scaled_mm")(*operands, *form), operator("scaled_mm")(*operands, True, False, clusters)
    agree(wide, plain.scaled_mm, operands)
    assert wide.dtype == torch.float32 and torch.equal(got, wide.to(torch.float32 if fp32 else torch.bfloat16))


def test_dense_with_many_blocks_of_k(device):
    """More than 32, whose scales lie in the lanes of a warp."""
    operands = operands_of(20, 24, 4624, device)
    agree(operator("scaled_mm")(*operands, True), plain.scaled_mm, operands)


@pytest.mark.parametrize("m, n, k", [(1, 8, 16), (130, 136, 272), (200, 137, 640), (600, 200, 640)])
@CLUSTERS
def test_dense_with_scales_of_rows(device, m, n, k, clusters, any_order):
    """wgrad: both operands have 1x128 tiles. N = 137 is no multiple of 8: single numbers are stored. The last of 600
    rows' tall tiles, one of 6 for 5 blocks and of 3 for 2 clusters, is halved; its second half is empty.
    """
    operands = (*plain.quantize_1x128(matrix(m, k, device=device)),
                *plain.quantize_1x128(matrix(n, k, device=device)))
    agree(operator("scaled_mm")(*operands, True, False, clusters), plain.scaled_mm, operands)


@FORMS
@pytest.mark.parametrize("m, n", [(520, 264), (300, 384), (1200, 128)])
def test_tall_tiles(device, m, n, form):
    """In the emulation there are 5 blocks or 2 clusters: the last of 6 tiles is halved for blocks, the last of 5 wide
    ones for clusters, of which a half is partly empty; in the first case all are whole.
    """
    if device.type == "cuda":
        m, n = 16 * m, 32 * n
    operands = operands_of(m, n, 272, device)
    agree(operator("scaled_mm")(*operands, *form), plain.scaled_mm, operands)


def test_a_transposed_weight_with_padded_rows(device):
    """dgrad: codes of the transpose as quantize_blocks leaves them, K padded to whole tiles."""
    grad, weight = matrix(70, 200, device=device), matrix(200, 96, device=device)
    _, _, q_t, s_t = operator("quantize_blocks")(weight, True, False)
    operands = *plain.quantize_1x128(grad), *plain.quantize_128x128(weight.t())
    grad_q = torch.nn.functional.pad(operands[0].view(torch.uint8), (0, 8)).view(torch.float8_e4m3fn)
    got = operator("scaled_mm")(grad_q[:, :200], operands[1], q_t, s_t, False)
    agree(got, plain.scaled_mm, operands)


@pytest.mark.parametrize("of_rows", [False, True])
def test_codes_behind_the_columns_are_not_read(device, of_rows):
    """Rows of both operands are further apart than they are wide, with NaN between them."""
    operands = [*operands_of(130, 136, 200, device)]
    if of_rows:
        operands[2:] = plain.quantize_1x128(matrix(136, 200, device=device))
    apart = [torch.full((q.shape[0], 256), float("nan"), device=device).to(q.dtype) for q in operands[::2]]
    for wide, q in zip(apart, operands[::2]):
        wide.view(torch.uint8)[:, :200] = q.view(torch.uint8)
    got = operator("scaled_mm")(apart[0][:, :200], operands[1], apart[1][:, :200], operands[3], True)
    agree(got, plain.scaled_mm, tuple(operands))


def row_tiles(counts: list[int], device, height: int = 128) -> torch.Tensor:
    return torch.tensor(tile_rows(counts, height), dtype=torch.int32, device=device)


@pytest.mark.parametrize("tall", [False, True])
@FORMS
@pytest.mark.parametrize("counts", [[5, 0, 130], [0, 0, 1], [128, 384]])
def test_rows_grouped(device, counts, form, tall):
    """Groups begin at any row, and end within tiles; rows of the next are no one's to write."""
    a, b = matrix(sum(counts), 272, device=device), matrix(len(counts), 200, 272, device=device)
    operands = *plain.quantize_1x128(a), *plain.quantize_128x128(b)
    tiles = row_tiles(counts, device, 256 if tall else 128)
    got = operator("grouped_scaled_mm")(*operands, tiles, tall, *form)
    agree(got, plain.grouped_scaled_mm, (*operands, counts))


def test_tma_store_leaves_the_next_group_alone(device, monkeypatch):
    """In the emulation the first of 5 blocks computes the last group before the fifth block the one before it."""
    monkeypatch.setenv("EMULATION_ORDER", "forward")
    counts = [5] * 5 + [20]
    operands = (*plain.quantize_1x128(matrix(sum(counts), 128, device=device)),
                *plain.quantize_128x128(matrix(len(counts), 64, 128, device=device)))
    got = operator("grouped_scaled_mm")(*operands, row_tiles(counts, device), False, False, True)
    agree(got, plain.grouped_scaled_mm, (*operands, counts))


@pytest.mark.parametrize("m, counts", [
    (72, [5, 0, 130]), (72, [0, 0, 1]), (72, [128, 256]), (72, [5, 1300]), (296, [130, 0, 600]), (296, [1, 200, 3])])
@CLUSTERS
def test_depth_grouped(device, m, counts, clusters, any_order):
    """Operands as the kernel makes them: every group starts a new tile. Three groups of 296 rows have 12 tall tiles, of
    which the last two are halved for 5 blocks.
    """
    x, grad = matrix(sum(counts), 136, device=device), matrix(sum(counts), m, device=device)
    tiles = row_tiles(counts, device)[:, 1:].contiguous()
    first, groups = 0, []
    for count in counts:
        groups.append((first, -(-count // 128)))
        first += groups[-1][1]
    a, b = (operator("quantize_columns")(t, tiles, False) for t in (grad, x))
    table = torch.tensor(groups, dtype=torch.int32, device=device)
    got = operator("grouped_scaled_mm_wgrad")(*a, *b, table, True, clusters)
    a, b = (plain.quantize_128x1(t, False, counts) for t in (grad, x))
    agree(got, plain.grouped_scaled_mm_wgrad, (*a, *b, counts))


def test_a_lost_tile_is_lost_in_the_product(device):
    a, b = matrix(3, 256, device=device), matrix(8, 256, device=device)
    a[1, 200] = float("inf")
    operands = *plain.quantize_1x128(a), *plain.quantize_128x128(b)
    got = operator("scaled_mm")(*operands, True)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()
