"""Plants mistakes in csrc/, one at a time, and says which tests see each: on the emulation, or of what it does not run.

    python tests/emulation/mistakes.py [--only PART_OF_A_FILE_OR_NAME]

By hand, since each takes a compilation and a run of tests, minutes for those of launches, which nvcc compiles. A
mistake that no test sees is the reason to write one. A replacement that is no longer in its file is an error, so that
the table cannot rot.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mistakes_at_edges import EDGES
from mistakes_on_hopper import ON_HOPPER

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mistake:
    """`old`, which must be in csrc/`file`, becomes `new`; `tests` are to fail, a file of tests/gpu or a path in tests/.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


QUANTIZE, GEMM, PERMUTE = "test_kernels_quantize.py", "test_kernels_gemm.py", "test_kernels_permute.py"
ROPE, LOSS, FORMS = "test_kernels_rope.py", "test_kernels_cross_entropy.py", "test_kernels_forms.py"
E5M6 = "test_kernels_e5m6.py"

MISTAKES = (
    Mistake("E4M3 ties away from even", "numbers.cuh", "magnitude + 0x7ffff + ((magnitude >> 20) & 1)",
            "magnitude + 0x80000", QUANTIZE),
    Mistake("E4M3 truncated", "numbers.cuh", "magnitude + 0x7ffff + ((magnitude >> 20) & 1)", "magnitude", QUANTIZE),
    Mistake("E4M3 subnormals flushed", "numbers.cuh", "return e4m3(sign | (sum - 0x46800000));",
            "return e4m3(sign | (sum - sum));", QUANTIZE),
    Mistake("bfloat16 truncated", "numbers.cuh", "bits + 0x7fff + ((bits >> 16) & 1)", "bits", QUANTIZE),
    Mistake("power of two rounded down", "numbers.cuh", "(float_bits(scale) + 0x7fffff) & 0x7f800000",
            "float_bits(scale) & 0x7f800000", QUANTIZE),
    Mistake("scale of zeros", "numbers.cuh", "if (magnitude == 0) return 1.0f;", "if (magnitude == 0) return 0.0f;",
            QUANTIZE),
    Mistake("no smallest scale", "numbers.cuh", "if (scale < smallest) scale = smallest;", "(void)smallest;", QUANTIZE),
    Mistake("quotient not corrected", "numbers.cuh",
            "return copysignf(fmaf(fmaf(-quotient, scale, dividend), reciprocal, quotient), x);",
            "return x * lift * reciprocal;", QUANTIZE),
    Mistake("reciprocal of the next power of two", "numbers.cuh", "bits_float((254u << 23) - float_bits(tile_scale))",
            "bits_float((253u << 23) - float_bits(tile_scale))", QUANTIZE),
    Mistake("vectors of a tile exchanged", "quantize.cu", "first + (i * kRowLanes + lane) * kVector;",
            "first + (i * kRowLanes + lane + i) * kVector;", QUANTIZE),
    Mistake("scale of one vector", "quantize.cu", "largest = Max{}(largest, largest_magnitude(values[i]));",
            "largest = largest_magnitude(values[i]);", QUANTIZE),
    Mistake("scale not corrected", "numbers.cuh", "return fmaf(fmaf(-quotient, max, x), reciprocal, quotient);",
            "return quotient;", QUANTIZE),
    Mistake("sign of zero lost", "numbers.cuh",
            "copysignf(fmaf(fmaf(-quotient, scale, dividend), reciprocal, quotient), x)",
            "fmaf(fmaf(-quotient, scale, dividend), reciprocal, quotient)", QUANTIZE),
    Mistake("E5M6 ties away from even", "numbers.cuh", "magnitude + 0xffff + ((magnitude >> 17) & 1)",
            "magnitude + 0x10000", E5M6),
    Mistake("E5M6 subnormals flushed", "numbers.cuh", "(float_bits(bits_float(magnitude) + 8.0f) - 0x41000000)", "0u",
            E5M6),
    Mistake("E5M6 codes of a lost tile", "numbers.cuh", "scale == scale ? to_e5m6(x[i] * reciprocal) : 0x7e0",
            "to_e5m6(x[i] * reciprocal)", E5M6),
    Mistake("E5M6 bits of the next code", "numbers.cuh", "(b >> 28 | c << 4) & 0xfff", "(b >> 28 | c << 8) & 0xfff",
            E5M6),
    Mistake("tiles of rows and columns exchanged", "quantize_tiles.cuh",
            "of_all = int(blockIdx.x) / out.column_tiles, column_tile = int(blockIdx.x) % out.column_tiles",
            "of_all = int(blockIdx.x) % out.column_tiles, column_tile = int(blockIdx.x) / out.column_tiles", QUANTIZE),
    Mistake("tile's rows of the next group", "quantize_tiles.cuh", "r < rows.count && column", "column", QUANTIZE),
    Mistake("no barrier before columns are read", "quantize_tiles.cuh",
            "load_tile<kind>(producer, shared, out, rows, power_of_two);\n  __syncthreads();",
            "load_tile<kind>(producer, shared, out, rows, power_of_two);", QUANTIZE),
    Mistake("half a column's maximum", "quantize_tiles.cuh",
            "Max{}(shared.magnitude[0][column], shared.magnitude[1][column])", "shared.magnitude[0][column]", QUANTIZE),
    Mistake("SwiGLU's derivative without its second term", "producers.cuh", "* s * (1.0f + g[i] * (1.0f - s))", "* s",
            QUANTIZE),
    Mistake("kept gate and up not rounded", "producers.cuh", "out[i] = round_to_bf16(out[i]);", "out[i] = out[i];",
            QUANTIZE),
    Mistake("SwiGLU's gradients exchanged", "producers.cuh", "if (column < half) {", "if (column >= half) {", QUANTIZE),
    Mistake("SwiGLU's up gradient of up", "producers.cuh",
            "round_to_bf16(round_to_bf16(g[i] / (1.0f + expf(-g[i]))) * d[i])", "round_to_bf16(d[i])", QUANTIZE),
    Mistake("RMSNorm without eps", "producers.cuh", "/ float(columns) + eps)", "/ float(columns))", QUANTIZE),
    Mistake("RMSNorm's gradient without the mean", "producers.cuh", "(out[i] - n[i] * own_inner) * own_rstd",
            "out[i] * own_rstd", QUANTIZE),
    Mistake("descriptor of half the stride", "hopper.cuh", "uint64_t(kSwizzleAtom >> 4) << 32",
            "uint64_t(kSwizzleAtom >> 5) << 32", GEMM),
    Mistake("no step along K", "gemm_kernel.cuh", "from_a + i * kStep, from_b + i * kStep", "from_a, from_b", GEMM),
    Mistake("first product accumulates", "gemm_kernel.cuh", "from_b + i * kStep, i > 0)", "from_b + i * kStep, true)",
            GEMM),
    Mistake("products not waited for", "gemm_kernel.cuh", "  hopper::product_wait();\n", "", GEMM),
    Mistake("stage released before it was read", "gemm_kernel.cuh",
            "  hopper::barrier_wait(&shared.full[ring.stage], ring.parity);\n",
            "  hopper::barrier_wait(&shared.full[ring.stage], ring.parity);\n"
            "  if (lane_id() == 0) hopper::barrier_arrive(&shared.empty[ring.stage]);\n", GEMM),
    Mistake("full stage not waited for", "gemm_kernel.cuh",
            "  hopper::barrier_wait(&shared.full[ring.stage], ring.parity);\n", "", GEMM),
    Mistake("parity of the empty stages", "gemm_kernel.cuh", "ring.parity ^ 1)", "ring.parity)", GEMM),
    Mistake("bytes of one operand only", "gemm_kernel.cuh", "(kTileN + (both ? 2 : 1) * kHalf) * kTile",
            "kTileN * kTile", GEMM),
    Mistake("bytes of both halves always", "gemm_kernel.cuh", "(both ? 2 : 1) * kHalf", "F::Waves * kHalf", GEMM),
    Mistake("second half of the first's rows", "gemm_kernel.cuh", "row + kHalf, full", "row, full", GEMM),
    Mistake("stage released before its second half", "gemm_kernel.cuh", "if (wave == waves - 1) release",
            "if (wave == 0) release", GEMM),
    Mistake("no arrival at the other block's barrier", "gemm_kernel.cuh",
            "if (lane_id() < F::Cluster) hopper::barrier_arrive_at(empty, lane_id());",
            "if (lane_id() == 0) hopper::barrier_arrive(empty);", GEMM),
    Mistake("both arrivals at the own barrier", "gemm_kernel.cuh", "hopper::barrier_arrive_at(empty, lane_id());",
            "hopper::barrier_arrive(empty);", GEMM),
    Mistake("barrier of one block's consumers", "gemm_kernel.cuh", "kConsumerWarps * F::Cluster);", "kConsumerWarps);",
            GEMM),
    Mistake("multicast to the first block", "gemm_kernel.cuh", "(1 << F::Cluster) - 1", "1", GEMM),
    Mistake("multicast to the other block only", "gemm_kernel.cuh", "(1 << F::Cluster) - 1", "2 >> rank", GEMM),
    Mistake("multicast by both blocks", "gemm_kernel.cuh", "if (both || rank == 0)", "", GEMM),
    Mistake("end before the other block's last arrival", "gemm_kernel.cuh",
            "  if constexpr (F::Cluster > 1) hopper::cluster_barrier();\n}", "}", GEMM),
    Mistake("start before the other block's barriers", "gemm_kernel.cuh",
            "    hopper::cluster_barrier();\n    return", "    __syncthreads();\n    return", GEMM),
    Mistake("clusters that take each other's turns", "gemm_kernel.cuh",
            "turn < turns_of(product); turn += gridDim.x / F::Cluster", "turn < turns_of(product); turn += gridDim.x",
            GEMM),
    Mistake("tile of the other block of the cluster", "gemm_schedule.cuh", "(place.n * Cluster + rank) * kTileN",
            "(place.n * Cluster + 1 - rank) * kTileN", GEMM),
    Mistake("halves of the first half's rows", "gemm_schedule.cuh", "work.a_row += half * kHalf;", ";", GEMM),
    Mistake("halves stored twice", "gemm_schedule.cuh", "work.out_row += half * kHalf;", ";", GEMM),
    Mistake("last halves forgotten", "gemm_schedule.cuh", "p.whole + 2 * (p.tiles - p.whole)", "p.tiles", GEMM),
    Mistake("staged rows not fenced", "gemm_store.cuh", "  hopper::fence_for_copies();\n", "", GEMM),
    Mistake("staged rows not waited for", "gemm_store.cuh", "  hopper::fence_for_copies();\n  __syncwarp();",
            "  hopper::fence_for_copies();", GEMM),
    Mistake("rows staged over a copy's", "gemm_store.cuh", "  hopper::wait_for_reads();", "", GEMM),
    Mistake("copies not committed", "gemm_store.cuh", "  hopper::commit_copies();\n", "", GEMM),
    Mistake("end before the copies' reads", "gemm_kernel.cuh",
            "  if constexpr (F::store == Store::kCopyEngine) hopper::wait_for_reads();\n", "", GEMM),
    Mistake("rows of the next group copied", "gemm_kernel.cuh",
            "work.rows - row, F::grouping == Grouping::kRows}", "work.rows - row, false}", GEMM),
    Mistake("a group's last rows not stored", "gemm_store.cuh", "if (row < place.exist && group",
            "if (row + 1 < place.exist && group", GEMM),
    Mistake("matrices in the other order", "gemm_store.cuh",
            "staging.eight(lane % Boxes::kRows, group + lane / Boxes::kRows)",
            "staging.eight(lane % 8 + lane / 16 * 8, group + lane / 8 % 2)", GEMM),
    Mistake("boxes without their swizzle", "gemm_store.cuh", "hopper::swizzled(row * hopper::kSwizzleRow",
            "uint32_t(row * hopper::kSwizzleRow", GEMM),
    Mistake("second box over the first's columns", "gemm_store.cuh",
            "(place.column + i * Boxes::kColumns) * int(sizeof(bf16))", "place.column * int(sizeof(bf16))", GEMM),
    Mistake("no barrier for the columns' scales", "gemm_kernel.cuh",
            "  hopper::warpgroup_barrier(1 + consumer);\n", "", GEMM),
    Mistake("one buffer of columns' scales", "gemm_kernel.cuh", "          buffer ^= 1;\n", "", GEMM),
    Mistake("scales of the first block of K", "gemm_scales.cuh", "rows_of_a_[row_[wave][half] + mine]",
            "rows_of_a_[row_[wave][half]]", GEMM),
    Mistake("scales of this lane's step", "gemm_scales.cuh", "lane_id() / kQuad * kQuad + k % kQuad", "lane_id()",
            GEMM),
    Mistake("scales of the group before", "gemm_scales.cuh", "read_rows(k + kQuad);", "read_rows(k);", GEMM),
    Mistake("block scales of 32 steps earlier", "gemm_scales.cuh", "read_columns(k + kColumnSteps);",
            "read_columns(0);", GEMM),
    Mistake("column scales of two steps earlier", "gemm_scales.cuh", "k / 2 % 2 ? high : low", "low", GEMM),
    Mistake("rows of the other half", "gemm_kernel.cuh", "row[i / 2 % 2] * column",
            "row[i / 2 % 2 ^ 1] * column", GEMM),
    Mistake("one scale of two columns", "gemm_kernel.cuh", "* column.scale[j]", "* column.scale[0]", GEMM),
    Mistake("scales of the columns before", "gemm_kernel.cuh", "hopper::accumulator_column(thread, i) / 2]",
            "hopper::accumulator_column(thread, i) / 2 & ~1]", GEMM),
    Mistake("one group's turns", "gemm_fp8.cu", "int64_t(product.m_tiles) * product.n_tiles * groups",
            "int64_t(product.m_tiles) * product.n_tiles", GEMM),
    Mistake("an empty half of a weight loaded", "gemm_schedule.cuh",
            "int(p.m - work.a_row < p.tile_m ? p.m - work.a_row : p.tile_m)", "p.tile_m", GEMM),
    Mistake("groups of four steps always", "gemm_kernel.cuh",
            "group + kQuad < work.k_tiles ? group + kQuad : work.k_tiles", "group + kQuad", GEMM),
    Mistake("rows of scales one after another", "gemm_scales.cuh", "r < work.rows ? r * int(p.pitch_a) : 0",
            "r < work.rows ? r : 0", GEMM),
    Mistake("store of the wrong quad", "gemm_store.cuh", "const int column = (first + thread % 4) * 8;",
            "const int column = (first + thread % 2) * 8;", GEMM),
    Mistake("a tile's last row not stored", "gemm_kernel.cuh", "row < work.rows,", "row + 1 < work.rows,", GEMM),
    Mistake("a lane's results truncated", "gemm_store.cuh",
            "pack_bf16x2(total[(first + i) * 4], total[(first + i) * 4 + 1]);",
            "lane_id() == 5 ? float_bits(total[(first + i) * 4]) >> 16 | (float_bits(total[(first + i) * 4 + 1]) & "
            "0xffff0000u) : pack_bf16x2(total[(first + i) * 4], total[(first + i) * 4 + 1]);", GEMM),
    Mistake("tile of another matrix", "gemm_schedule.cuh", "work.matrix * p.n + work.column", "work.column", GEMM),
    Mistake("columns behind the edge", "gemm_schedule.cuh",
            "int(p.n - work.column < kTileN ? p.n - work.column : kTileN)", "kTileN", GEMM),
    Mistake("unstable sort", "route.cu", "slot = shared.start[expert] + next[expert] + __popc(before);",
            "slot = shared.start[expert] + next[expert] + __popc(same) - 1 - __popc(before);", PERMUTE),
    Mistake("padding not cleared", "route.cu", "copy_of_slot[slot] = -1;", ";", PERMUTE),
    Mistake("slots not rounded up", "route.cu", "round_up(shared.start[expert], shape.align)", "shared.start[expert]",
            PERMUTE),
    Mistake("blocks before this one and itself", "route.cu", "block < int(blockIdx.x) ? count",
            "block <= int(blockIdx.x) ? count", PERMUTE),
    Mistake("a part of the blocks", "route.cu", "first += kTogether * parts", "first += kTogether * blocks", PERMUTE),
    Mistake("each part of all blocks", "route.cu", "const int block = first + j * parts;",
            "const int block = first + j;", PERMUTE),
    Mistake("sums over blocks not cleared", "route.cu", "shared.before[e] = shared.start[e] = 0;", ";", PERMUTE),
    Mistake("no barrier of the grid", "route.cu", "\n  wait_for_all_blocks();\n", "\n", PERMUTE),
    Mistake("gather of the copy, not its token", "permute.cu", "copy / copies_of_token", "copy", PERMUTE),
    Mistake("weight forgotten", "permute.cu", "total[i] += weight * values[i]", "total[i] += values[i]", PERMUTE),
    Mistake("weight's gradient of the weighted row", "permute.cu", "product += g[i] * values[i];",
            "product += weight * g[i] * values[i];", PERMUTE),
    Mistake("turned the same way back", "rope.cu", "inverse ? -angles.sin[pair + i] : angles.sin[pair + i]",
            "angles.sin[pair + i]", ROPE),
    Mistake("no barrier before the turned part", "rope.cu",
            "  __syncthreads();\n  const int joint", "  const int joint", ROPE),
    Mistake("a sum not rescaled", "cross_entropy.cu", "  if (max != online.max) online.rescale(max);\n",
            "  online.max = max;\n", LOSS),
    Mistake("label of the row's part", "cross_entropy.cu",
            "const int64_t label = labels[row] - first_id;\n  const float",
            "const int64_t label = labels[row];\n  const float", LOSS),
    *(Mistake("kernels on the default stream", f"{stem}_binding.cpp", "launch.stream()", "nullptr", tests)
      for stem, tests in (("gemm", GEMM), ("quantize", QUANTIZE), ("e5m6", E5M6), ("routing", PERMUTE), ("rope", ROPE),
                          ("cross_entropy", LOSS))),
    Mistake("the guard ends before the launch", "e5m6_binding.cpp", "const Launch launch(x);",
            "void* stream = Launch(x).stream(); struct { void* s; void* stream() const { return s; } } launch{stream};",
            E5M6),
    *(Mistake(*row) for row in (*EDGES, *ON_HOPPER)),
)


def tree_with(mistake: Mistake, folder: Path) -> Path:
    """A copy of what the build reads, with the mistake in it; objects of files without one stay there."""
    for part in ("csrc", "tests/emulation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for path in (ROOT / part).glob("*"):
            if path.is_file():
                (folder / part / path.name).write_bytes(path.read_bytes())
    path = folder / "csrc" / mistake.file
    text = path.read_text()
    if text.count(mistake.old) < 1:
        raise SystemExit(f"error: {mistake.name}: {mistake.file} has no {mistake.old!r}")
    path.write_text(text.replace(mistake.old, mistake.new))
    return folder


def pytest_command(*words: Path | str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *map(str, words)]


def verdict(mistake: Mistake, folder: Path) -> str:
    tree = tree_with(mistake, folder)
    if "/" not in mistake.tests:
        return verdict_by_emulation(mistake, tree)
    for path in (f"tests/{mistake.tests}", "pyproject.toml", "docs/kernels.md"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes((ROOT / path).read_bytes())
    return outcome(subprocess.run(pytest_command("-m", "slow or not slow", tree / "tests" / mistake.tests), cwd=tree,
                                  text=True, capture_output=True))


def verdict_by_emulation(mistake: Mistake, tree: Path) -> str:
    library = tree / "emulated.so"
    built = subprocess.run([sys.executable, tree / "csrc" / "build.py", "--emulated", "--output", library], text=True,
                           capture_output=True)
    if built.returncode:
        return "does not compile: " + built.stderr.strip().splitlines()[-1][:100]
    try:
        return outcome(subprocess.run(
            pytest_command(ROOT / "tests" / "gpu" / mistake.tests), text=True, capture_output=True, timeout=200,
            env=os.environ | {"EMULATED_LIBRARY": str(library)}))
    except subprocess.TimeoutExpired:
        return "seen: a test hangs"


def outcome(run: subprocess.CompletedProcess) -> str:
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if failed:
        return f"seen by {failed[0].split('::')[1].split(' ')[0]}"
    return "NOT SEEN" if run.returncode == 0 else f"seen: the process ends with {run.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mistakes whose files or names have this in them")
    only = parser.parse_args().only
    chosen = [mistake for mistake in MISTAKES if only in f"{mistake.file} {mistake.name}"]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for mistake in chosen:
            outcome = verdict(mistake, Path(folder))
            missed += not outcome.startswith("seen")
            print(f"{mistake.file:20} {mistake.name:45} {outcome}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mistakes seen")
    return missed


if __name__ == "__main__":
    sys.exit(main())
