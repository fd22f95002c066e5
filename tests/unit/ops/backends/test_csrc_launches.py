"""How csrc/ launches its kernels and describes tensors to the copy engine, as nvcc compiled it for the host.

The emulation has launches and tensor maps of its own, so that a wrong box, swizzle, cluster or size of shared memory
would be met on a GPU first. Here tests/emulation/launches.cpp runs the very objects of the library on a CUDA runtime
that only says what it is asked for.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
build = sys.modules["csrc_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not installed")]

MULTIPROCESSORS = 132  # as the stand-in says
KIB = 1024
# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT8, two dimensions, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
# CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE (zeros).
KIND = [0, 2, 0, 3, 3, 0]
NO_MAP = {"address": 0, "sizes": [0, 0], "stride": 0, "box": [0, 0], "steps": [0, 0], "kind": [0] * 6}


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> dict[str, list[dict]]:
    """Return what each call asked the runtime for."""
    objects, _ = build.compile_kernels(jobs=2)
    program = tmp_path_factory.mktemp("launches") / "launches"
    build.run_command([build.find_nvcc(), "-std=c++17", "-O1", "-cudart", "none", f"-I{build.SOURCES}",
                       str(build.EMULATION / "launches.cpp"), *map(str, objects), "-o", str(program)])
    found: dict[str, list[dict]] = {}
    for line in build.run_command([str(program)]).splitlines():
        said = json.loads(line)
        found.setdefault(said.pop("call"), []).append(said)
    return found


def tensor_map(address: int, rows: int, columns: int, pitch: int, box_rows: int = 128) -> dict:
    """Bytes, the inner dimension first; boxes are 128 bytes wide, as the swizzle is."""
    return {"address": address, "sizes": [columns, rows], "stride": pitch, "box": [128, box_rows], "steps": [1, 1],
            "kind": KIND}


A, B = tensor_map(0x1000, 16400, 600, 640), tensor_map(0x3000, 400, 600, 656)


@pytest.mark.parametrize("call, expected", [
    ("dense", [A, B, NO_MAP]), ("float32", [A, B, NO_MAP]), ("clusters", [A, B, NO_MAP]),
    ("tma_store", [A, B, tensor_map(0x5000, 16400, 800, 800, box_rows=16)]),
    ("unaligned", [tensor_map(0x1000, 100, 128, 128), tensor_map(0x3000, 391, 128, 128), NO_MAP]),
    ("grouped", [tensor_map(0x1000, 1000, 256, 256), tensor_map(0x3000, 3 * 200, 256, 256), NO_MAP]),
    ("wgrad", [tensor_map(0x1000, 300, 1024, 1024), tensor_map(0x3000, 136, 1024, 1024), NO_MAP])])
def test_tensor_maps(launches, call, expected):
    """Rows of bfloat16 of the result are bytes, too; one whose rows begin anywhere has no map."""
    (launch,) = launches[call]
    assert launch["maps"] == expected


@pytest.mark.parametrize("call, turns, halves, stages", [
    ("dense", 65 * 4, 2, 4), ("float32", 65 * 4, 2, 4), ("tma_store", 65 * 4, 2, 4), ("small", 2, 1, 6),
    ("grouped", 9 * 2, 1, 6), ("wgrad", 3 * 2 * 2 * 2, 1, 6)])
def test_products(launches, call, turns, halves, stages):
    """A persistent block on each multiprocessor, if there is work for so many, with room for the ring of stages."""
    (launch,) = launches[call]
    assert launch["grid"] == [min(turns, MULTIPROCESSORS), 1, 1] and launch["threads"] == [3 * 128, 1, 1]
    assert launch["cluster"] == [1, 1, 1] and not launch["cooperative"]
    ring = stages * (halves + 1) * 128 * 128
    assert ring < launch["shared"] <= 227 * KIB and f"Li{halves}E" in launch["kernel"]


def test_clusters(launches):
    """Two neighbouring blocks each, and no more than all multiprocessors hold."""
    (launch,) = launches["clusters"]
    assert launch["cluster"] == [2, 1, 1]
    assert launch["grid"] == [2 * min(65 * 2, MULTIPROCESSORS // 2), 1, 1]


@pytest.mark.parametrize("call, grid, threads", [
    ("quantize_rows", [300, 1, 1], 256), ("quantize_columns", [3 * 5, 1, 1], 256),
    ("quantize_blocks", [4 * 3 * 5, 1, 1], 256), ("norm_weight", [4, 256, 1], 256), ("e5m6", [300, 1, 1], 256),
    ("gather", [1000, 1, 1], 256), ("gather of scales", [126, 1, 1], 256), ("combine", [77, 1, 1], 256),
    ("combine_backward", [77, 1, 1], 256), ("rope", [77, 1, 1], 256), ("keys_values", [77, 1, 1], 256),
    ("cross_entropy", [77, 1, 1], 512)])
def test_grids(launches, call, grid, threads):
    (launch,) = launches[call]
    assert (launch["grid"], launch["threads"]) == (grid, [threads, 1, 1])
    assert launch["cluster"] == [1, 1, 1] and not launch["cooperative"]


def test_blocks_that_wait_for_each_other_are_all_resident(launches):
    assert [launch["grid"] for launch in launches["route"]] == [[1, 1, 1], [16, 1, 1], [128, 1, 1]]
    assert all(launch["cooperative"] for launch in launches["route"])


def test_every_launch(launches):
    """On the caller's stream; more than 48 KiB of shared memory must be allowed first, for that very kernel."""
    made = [launch for several in launches.values() for launch in several if "error" not in launch]
    assert len(made) > 20
    for launch in made:
        assert launch["stream"] == 0x77
        assert launch["shared"] <= max(48 * KIB, launch["allowed"]), launch["kernel"]
    assert any(launch["shared"] > 48 * KIB and "tile_kernel" in launch["kernel"] for launch in made)


@pytest.mark.parametrize("call, error", [
    ("without the driver's encoder", "the driver has no cuTensorMapEncodeTiled"),
    ("Ampere", "FP8 products by wgmma need compute capability 9.0"),
    ("Blackwell", "FP8 products by wgmma need compute capability 9.0"),
    ("too many blocks", "a grid of more than 2^31 - 1 blocks")])
def test_refusals(launches, call, error):
    assert launches[call] == [{"error": error}]


def test_what_the_runtime_refuses_is_an_error(launches):
    assert launches["refused"][1:] == [{"error": "launch of a kernel: as it was told to"}]


def test_nothing_is_launched_for_no_tiles(launches):
    assert "no tiles" not in launches
