"""Each PTX instruction that csrc/hopper.cuh names, written a second time by the grammar of the PTX ISA (8.x).

The emulation has functions of its own in their place, so that an operand in the wrong place, a wait for one group too
few or a barrier for too many threads would be met on a GPU first. No nvcc is needed. What ptxas makes of them is in
test_csrc_sass.py.
"""

import re
from pathlib import Path

import pytest

HEADER = (Path(__file__).parents[4] / "csrc" / "hopper.cuh").read_text()
REAL = HEADER.split("#ifndef MEGATRON_DEEPSEEK_EMULATED\n\nusing Barrier")[1].split("inline auto tensor_map_encoder")[0]
FUNCTION = re.compile(r"__device__ __forceinline__ \w+ (\w+)\((.*?)\) \{(.*?)\n?\}(?=\n\n|\n__device__|\n$)", re.S)

# function -> its parameters, and the instructions with what stands for each operand. Addresses of shared memory are
# written as @name.
EXPECTED = {
    "barrier_init": ("barrier arrivals", "mbarrier.init.shared::cta.b64 [@barrier], arrivals;"),
    "barrier_init_fence": ("", "fence.mbarrier_init.release.cluster;"),
    "barrier_arrive": ("barrier", "mbarrier.arrive.shared::cta.b64 _, [@barrier];"),
    "barrier_arrive_at": ("barrier rank", "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, @barrier, rank; "
                          "mbarrier.arrive.shared::cluster.b64 _, [remote]; }"),
    "cluster_barrier": ("", "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"),
    "barrier_arrive_expecting": ("barrier bytes", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [@barrier], bytes;"),
    "barrier_wait": ("barrier parity", "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [@barrier], "
                     "parity; selp.u32 done, 1, 0, p; }"),
    "prefetch": ("map", "prefetch.tensormap [map];"),
    "copy_tile": ("to map column row barrier",  # the inner coordinate first, as the map's sizes are
                  "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                  "[@to], [map, {column, row}], [@barrier];"),
    "copy_tile_to_cluster": ("to map column row barrier blocks",
                             "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                             ".multicast::cluster [@to], [map, {column, row}], [@barrier], blocks;"),
    "store_matrices": ("row word", "stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [@row], "
                       "{word[0], word[1], word[2], word[3]};"),
    "fence_for_copies": ("", "fence.proxy.async.shared::cta;"),
    "copy_tile_out": ("map column row from", "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group "
                      "[map, {column, row}], [@from];"),
    "commit_copies": ("", "cp.async.bulk.commit_group;"),
    "wait_for_reads": ("", "cp.async.bulk.wait_group.read 0;"),
    "product_fence": ("", "wgmma.fence.sync.aligned;"),
    "product_commit": ("", "wgmma.commit_group.sync.aligned;"),
    "product_wait": ("", "wgmma.wait_group.sync.aligned 0;"),
    "hold": ("d", ""),
    "product": ("d a b accumulate", "{ .reg .pred p; setp.ne.b32 p, accumulate, 0; "
                "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
                + ", ".join(f"d[{i}]" for i in range(64)) + "}, a, b, p, 1, 1; }"),
    "give_registers": ("", "setmaxnreg.dec.sync.aligned.u32 Registers;"),
    "take_registers": ("", "setmaxnreg.inc.sync.aligned.u32 Registers;"),
    "warpgroup_barrier": ("id", "bar.sync id, 128;"),
}
NO_MEMORY = {"barrier_init"}  # the fence after it has it


def operands_of(text: str) -> list[str]:
    """Return what stands for %0, %1, ... in the lists of outputs and inputs of an asm statement."""
    for first, eighth in re.findall(r"D8\((\d+)\)()", text):
        text = text.replace(f"D8({first})", ", ".join(f'"+f"(d[{int(first) + i}])' for i in range(8)))
    found = re.findall(r'"[=+]?[rlhfn]"\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)', text)
    shown = [re.sub(r"shared_address\((\w+)\)", r"@\1", each) for each in found]
    return [re.sub(r"^\w+\((\w+)\)$", r"\1", each) for each in shown]  # a conversion of one name


def instructions(body: str) -> str:
    """Return the PTX of a function's asm statement with its operands' names in place."""
    statement = re.search(r"asm volatile\(\s*((?:\"(?:[^\"\\]|\\.)*\"\s*)+)(.*?)\);", body, re.S)
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', statement[1])).replace("\\n", " ")
    operands = operands_of(statement[2])
    text = re.sub(r"%(\d+)", lambda number: operands[int(number[1])], text)
    return " ".join(text.split())


FUNCTIONS = {name: (" ".join(re.findall(r"(\w+)\)?(?:\[\w+\]|\)\[\w+\])?(?:,|$)", parameters)), body)
             for name, parameters, body in FUNCTION.findall(REAL)}


def test_every_instruction_is_known():
    assert set(FUNCTIONS) == {*EXPECTED, "shared_address"}
    assert REAL.count("asm volatile") == len(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_instruction(name):
    parameters, body = FUNCTIONS[name]
    assert (parameters, instructions(body)) == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - NO_MEMORY))
def test_the_compiler_moves_no_memory_over_it(name):
    """But over what changes registers alone."""
    of_registers = name in ("give_registers", "take_registers", "product")
    assert ('"memory"' in FUNCTIONS[name][1]) != of_registers


def test_what_waits_goes_on_once_the_phase_is_over():
    assert re.search(r"uint32_t done = 0;\s*while \(!done\)\s*asm", FUNCTIONS["barrier_wait"][1])
