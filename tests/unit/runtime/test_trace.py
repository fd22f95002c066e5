"""Communication hidden behind computation, in traces made by hand, and the tool that prints it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deepseek.runtime.trace import Overlap, overlaps, read_trace, total

TOOL = Path(__file__).parents[3] / "tools" / "trace_overlap.py"


def kernel(name: str, begin: float, end: float, device: int = 0, **args) -> dict:
    """From `begin` to `end` in milliseconds."""
    return {"ph": "X", "cat": "kernel", "name": name, "ts": 1e3 * begin, "dur": 1e3 * (end - begin),
            "args": {"device": device, "stream": 7, **args}}


ALL_TO_ALL = {"Collective name": "all_to_allv", "Process Group Description": "mesh_ep"}
TRACE = {"traceEvents": [
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000},
    {"ph": "M", "name": "process_name"},
    kernel("gemm", 0, 100), kernel("gemm", 50, 150),  # two streams: busy from 0 to 150
    kernel("norm", 200, 210),
    kernel("gemm", 0, 1000, device=1),  # another device hides nothing here
    kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 120, 170, **ALL_TO_ALL),  # 30 of 50 hidden
    kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 190, 290, **ALL_TO_ALL),  # 10 of 100
    kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 140, 160),  # 10 of 20
    kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 900, 905, device=1),
]}


def test_by_hand():
    """Two collectives at once, as from 140 to 160, hide nothing for each other."""
    exchanged = Overlap("all_to_allv over mesh_ep", 2, 150e3, 40e3)
    reduced = Overlap("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 2, 25e3, 15e3)
    assert overlaps(TRACE) == [exchanged, reduced]
    assert total([exchanged, reduced]) == Overlap("all", 4, 175e3, 55e3)
    assert reduced.share == 0.6


def test_the_tool_prints_a_line_for_each_kind(tmp_path):
    path = tmp_path / "rank_00000.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump(TRACE, file)
    done = subprocess.run([sys.executable, TOOL, path], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[2][-6:] == ["mesh_ep", "2", "150.00", "40.00", "26.7", "%"]
    assert lines[-1] == ["all", "4", "175.00", "55.00", "31.4", "%"]


@pytest.mark.parametrize("text, words", [
    ('{"traceEvents": []}', "no CUDA kernels"), ("[]", "no traceEvents"), ("{", "is no trace"), (None, "is no trace")])
def test_what_is_no_trace_of_cuda_is_refused(tmp_path, text, words):
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        overlaps(read_trace(path))
