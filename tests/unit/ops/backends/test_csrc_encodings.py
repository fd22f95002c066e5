"""What csrc/ tells the hardware, against the PTX ISA's tables written out by hand: no GPU and no nvcc needed.

tests/emulation shares the kernels' own descriptor and layout functions, so a misreading in them would be seen by
neither side there. Here they are compared with a second reading.
"""

import importlib.util
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_deepseek.ops.backends.cuda import gemm

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "kernels.md").read_text()
spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

SHARED_BYTES = 227 * 1024  # of a block on compute capability 9.0
REGISTERS = 64 * 1024  # of a multiprocessor


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, list[tuple[int, ...]]]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("checks") / "checks"
    build.run_command([compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas",
                "-DMEGATRON_DEEPSEEK_EMULATED", f"-I{build.EMULATION}", f"-I{build.SOURCES}",
                str(build.EMULATION / "checks.cpp"), "-o", str(program)])
    lines = defaultdict(list)
    for line in build.run_command([str(program)]).splitlines():
        name, *numbers = line.split()
        lines[name].append(tuple(map(int, numbers)))
    return lines


def bits(number: int, first: int, last: int) -> int:
    return number >> first & (1 << last - first + 1) - 1


def test_matrix_descriptors(printed):
    """PTX ISA, "Matrix Descriptor Format" of wgmma: addresses and offsets are (x & 0x3FFFF) >> 4. Tiles start where the
    pattern of the 128-byte swizzle does, at multiples of 1,024 bytes, so the base offset is 0.
    """
    for address, descriptor in printed["descriptor"]:
        assert bits(descriptor, 0, 13) == (address & 0x3FFFF) >> 4
        assert bits(descriptor, 32, 45) << 4 == 8 * 128  # from 8 rows of 128 bytes to the next 8
        assert bits(descriptor, 49, 51) == 0
        assert bits(descriptor, 62, 63) == 1  # 128-byte swizzle
        assert not any(bits(descriptor, *unused) for unused in ((14, 15), (30, 31), (46, 48), (52, 61)))
        assert (address >> 7 & 7) == 0
        assert bits(descriptor + 3 * 2, 0, 13) << 4 == address + 3 * 32  # the last of four steps of 32 along K


def test_swizzle(printed):
    """CU_TENSOR_MAP_SWIZZLE_128B, as CUTLASS writes it, Swizzle<3, 4, 3>: bits 4-6 are xored with bits 7-9."""
    for offset, swizzled in printed["swizzle"]:
        row, chunk = offset // 128, offset // 16 % 8
        assert swizzled == row * 128 + (chunk ^ row % 8) * 16
    columns = defaultdict(set)  # 8 rows of one column of chunks lie in 8 different groups of banks
    for offset, swizzled in printed["swizzle"][:64]:
        columns[offset // 16 % 8].add(swizzled // 16 % 8)
    assert all(len(places) == 8 for places in columns.values())


def test_accumulator_fragments(printed):
    """PTX ISA, "Register Fragments" of wgmma m64nNk32, figure of D: thread t of warp w has, in register pairs, columns
    8 j + 2 (t % 4) and one more of rows 16 w + t / 4, then of 8 rows below.
    """
    expected = {}
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        registers = [(16 * warp + lane // 4 + 8 * half, 8 * j + 2 * (lane % 4) + one)
                     for j in range(16) for half in range(2) for one in range(2)]
        expected |= {(thread, i): place for i, place in enumerate(registers)}
    assert {(thread, i): (row, column) for thread, i, row, column in printed["accumulator"]} == expected
    assert len(set(expected.values())) == 64 * 128


def test_shared_memory_and_registers(printed):
    for waves, tile_m, stages, size, of_b, barriers in printed["form"]:
        assert tile_m == 128 * waves <= 256
        assert (tile_m + 128) * 128 < 2**20  # what an mbarrier can expect
        assert of_b % 1024 == 0 and tile_m * 128 % 1024 == 0 and barriers % 8 == 0
        assert size <= SHARED_BYTES and stages >= 4
    (producer, consumer, threads), = printed["registers"]
    compiled = REGISTERS // threads // 8 * 8  # what __launch_bounds__ leaves each thread, in steps of 8
    assert threads == 3 * 128 and producer % 8 == consumer % 8 == 0 and consumer <= 255
    assert (producer + 2 * consumer) * 128 <= compiled * threads  # consumers take what the producer gave, or wait


def test_every_tile_once(printed):
    seen = defaultdict(list)
    for m_tiles, n_tiles, m, n in printed["tile"]:
        seen[m_tiles, n_tiles].append((m, n))
    for (m_tiles, n_tiles), places in seen.items():
        assert sorted(places) == [(m, n) for m in range(m_tiles) for n in range(n_tiles)]
        for first in range(0, len(places), 8 * n_tiles):  # 8 tiles of M side by side, for the L2
            assert len({m for m, _ in places[first:first + 8 * n_tiles]}) <= 8


def turns(printed, kind: str = "turn") -> dict[tuple[int, int, int], list[tuple[int, ...]]]:
    """Return (block, first row, rows, column, columns, tiles of K) of every turn, by M, N and the number of blocks.
    M is that of all groups' results together where the kind is "depth", wgrad.
    """
    found = defaultdict(list)
    for m, n, blocks, *turn in printed[kind]:
        found[m, n, blocks].append(tuple(turn))
    return found


@pytest.mark.parametrize("kind", ["turn", "depth"])
def test_turns_cover_the_result_once(printed, kind):
    """Tall tiles, of which those of the last wave may be halved; what is empty has nothing to load."""
    few = {shape: of_blocks for shape, of_blocks in turns(printed, kind).items() if len(of_blocks) < 300}
    assert len(few) > 3
    for (m, n, _), of_blocks in few.items():
        seen = np.zeros((m, n), np.int8)
        for _, row, rows, column, columns, k_tiles in of_blocks:
            assert rows <= 256 and columns <= 128 and k_tiles == (rows > 0)
            seen[row:row + rows, column:column + columns] += 1
        assert (seen == 1).all()


def slowest(of_blocks: list[tuple[int, ...]]) -> float:
    """Return how long the slowest block takes, in turns of 256 x 128; one of up to 128 x 128 takes two thirds."""
    times = defaultdict(float)
    for block, _, rows, *_ in of_blocks:
        times[block] += 1 if rows > 128 else 2 / 3
    return max(times.values())


def test_the_documented_waves(printed):
    """docs/kernels.md's table: N, tall tiles at M = 4096 per multiprocessor, and the time with and without halves."""
    table = re.findall(r"^\| (\d+) \|[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) % \| (\d+) % \|$", PAGE, re.M)
    of_shape = {n: of_blocks for (m, n, blocks), of_blocks in turns(printed).items() if (m, blocks) == (4096, 132)}
    assert [int(row[0]) for row in table] == sorted(of_shape)
    for n, *numbers in table:
        tiles = 16 * -(-int(n) // 128)
        before = -(-tiles // 132) if tiles >= 264 else -(-2 * tiles // 132) * 2 / 3  # all tall, or all of 128 rows
        after = slowest(of_shape[int(n)])
        assert after <= before
        ideal = tiles / 132
        assert [float(x) for x in numbers] == [round(ideal, 2), round(before, 2), round(after, 2),
                                               round(100 * ideal / before), round(100 * ideal / after)], n


def test_the_documented_waves_of_wgrad(printed):
    """The same of docs/kernels.md's table of weights: before, all tiles were 128 x 128."""
    table = re.findall(r"^\| (\d+) x (\d+)(?:, (\d+) experts)? \|[^|]*\| ([\d.]+) \| ([\d.]+) \| (\d+) % "
                       r"\| (\d+) % \|$", PAGE, re.M)
    of_shape = {shape: of_blocks for shape, of_blocks in turns(printed, "depth").items() if shape[2] == 132}
    assert len(table) == len(of_shape)
    for m, n, groups, *numbers in table:
        m, n, groups = int(m), int(n), int(groups or 1)
        ideal = groups * -(-m // 128) * -(-n // 128) / 2 / 132  # in turns of 256 x 128 without idle blocks
        before = -(-groups * -(-m // 128) * -(-n // 128) // 132) * 2 / 3
        after = slowest(of_shape[groups * m, n, 132])
        assert [float(x) for x in numbers] == [round(before, 2), round(after, 2), round(100 * ideal / before),
                                               round(100 * ideal / after)], (m, n, groups)


@pytest.mark.parametrize("counts, tall", [
    ([512, 256], True), ([300], True), ([300, 300, 100], False), ([128] * 8, False), ([0, 0, 256], True)])
def test_tall_tiles_of_groups(counts, tall):
    """By hand: [300, 300, 100] has two whole tall tiles, and three with an empty half."""
    assert gemm.worth_tall_tiles(counts) == tall


@pytest.mark.parametrize("groups, clusters", [(1, True), (4, True), (5, False)])
def test_wgrad_of_many_experts_has_no_clusters(groups, clusters, monkeypatch):
    """As DeepGEMM's; alone where they were not asked for."""
    asked = []
    monkeypatch.setattr(gemm, "operator", lambda name: lambda *args: asked.append(args[-1]))
    q, scale, counts = torch.zeros(8, 128 * groups, dtype=torch.float8_e4m3fn), torch.ones(8, groups), [128] * groups
    for form in (gemm.grouped_scaled_mm_wgrad_clusters, gemm.grouped_scaled_mm_wgrad):
        form(q, scale, q, scale, counts)
    assert asked == [clusters, False]


def test_scales_by_a_reciprocal(printed):
    """Every mantissa of a tile's largest magnitude: no scale is another than that by IEEE's division."""
    assert printed["wrong_scales"] == [(0, 0)]


def test_division_by_a_reciprocal(printed):
    """About a million quotients: no code is another than that of the quotient by IEEE's division."""
    assert printed["wrong"] == [(0,)]
