"""csrc/ compiles for its GPUs, into registers alone: no spills, no stack, and Hopper's products are not serialised."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


def load(name: str, path: Path):
    """Return the module of a file that is in no package; its dataclasses look for it by name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("csrc_build", ROOT / "csrc" / "build.py")

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def compiled():
    return build.compile_kernels(jobs=2)


@pytest.mark.slow
@needs_nvcc
def test_no_spills_and_no_local_memory(compiled):
    _, reports = compiled
    assert {report.architecture for report in reports} == {"sm_80", "sm_90a"}
    bad = [report for report in reports if report.stack or report.spills]
    assert not bad, "\n".join(map(str, bad))


def documented_registers() -> dict[str, tuple[int, int, int]]:
    """Return the blocks, threads and registers of a kernel by the name of its row in docs/kernels.md's table."""
    page = (ROOT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\d+) blocks x (\d+) threads x .*?\((?:\d+ to )?(\d+) registers\) \|", page,
                      re.M)
    return {name: (int(blocks), int(threads), int(registers)) for name, blocks, threads, registers in rows}


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("row, part", [
    ("1x128", "rows_kernelINS_5PlainItE"), ("E5M6 and back", "quantize_e5m6_kernel"),
    ("loss", "statistics_kernelILi8E"), ("its gradient", "gradient_kernelILi8E")])
def test_documented_registers(compiled, row, part):
    """And as many blocks as the registers of a multiprocessor suffice for, which are given in eights."""
    if "release 13.0" not in build.run_command([build.find_nvcc(), "--version"]):
        pytest.skip("the page is of nvcc 13.0")
    blocks, threads, registers = documented_registers()[row]
    assert registers == max(report.registers for report in compiled[1]
                            if part in report.kernel and report.architecture == "sm_90a")
    assert blocks == 64 * 1024 // (-(-registers // 8) * 8 * threads)


@pytest.mark.slow
@needs_nvcc
def test_no_warnings(compiled):
    """C7510 would say that ptxas waits after every wgmma, C7508 that it ignores setmaxnreg."""
    logs = [path.with_suffix(".log").read_text() for path in compiled[0]]
    lines = [line for log in logs for line in log.splitlines() if "warning" in line.lower() or "C75" in line]
    assert not lines, "\n".join(lines)


@pytest.mark.slow
@needs_nvcc
def test_every_kernel_is_there(compiled):
    """By what is in the object files: names of kernels, for both architectures where the source is portable."""
    _, reports = compiled
    names = {name for name in (
        "rope_tail", "keys_values_kernel", "keys_values_backward", "statistics", "gradient", "route", "gather_rows",
        "combine_rows", "combine_backward", "rows_kernel", "tile_kernel", "quantize_e5m6", "dequantize_e5m6",
        "norm_weight")}
    for architecture in ("sm_80", "sm_90a"):
        kernels = " ".join(report.kernel for report in reports if report.architecture == architecture)
        assert not [name for name in names if name not in kernels]
    assert "gemm_kernel" in kernels


@pytest.mark.slow
@needs_nvcc
def test_the_library_links(compiled, tmp_path):
    """What it leaves to torch are the names of the stable ABI, nothing of C++ that changes with torch's version."""
    library = build.build_library(tmp_path / "kernels.so")
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("no nm and readelf")
    needed = build.run_command(["readelf", "-d", str(library)])
    assert "[libtorch.so]" in needed and "cudart" not in needed and "python" not in needed
    listed = build.run_command(["nm", "-D", "--undefined-only", str(library)])
    undefined = [line.split()[-1] for line in listed.splitlines()]
    torch_names = [name for name in undefined if "torch" in name.lower() or "c10" in name.lower()]
    assert torch_names and not [name for name in torch_names if name.startswith("_Z")], torch_names


def test_a_library_that_was_brought_is_kept_without_nvcc(tmp_path, monkeypatch, capsys):
    library = tmp_path / "brought.so"
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["build.py", "--or-keep", "--output", str(library)])
    with pytest.raises(SystemExit, match="nvcc was not found"):
        build.main()
    library.write_text("as it was")
    build.main()
    assert library.read_text() == "as it was" and "stays as it is" in capsys.readouterr().out


LOAD = """
import sys, torch
from pathlib import Path
from torch._subclasses import FakeTensorMode
from megatron_deepseek.ops.backends import kernels
kernels.load(Path(sys.argv[1]))
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert all(has(f"megatron_deepseek::{name}", "CUDA") for name in kernels.FAKES)
with FakeTensorMode():
    x = torch.empty(256, 512, dtype=torch.bfloat16, device="cuda")
    print([tuple(part.shape) for part in torch.ops.megatron_deepseek.quantize_rows(x, True)])
"""


@pytest.mark.slow
@needs_nvcc
def test_the_library_loads(compiled, tmp_path):
    """Beside a torch without CUDA, given the one function that it lacks: the operators are there, for CUDA tensors."""
    if build.why_not() is None:
        pytest.skip("tests/gpu loads it")
    lacking = tmp_path / "lacking.cpp"
    lacking.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }')
    build.run_command([os.environ.get("CXX", "g++"), "-shared", "-fPIC", str(lacking), "-o",
                       str(tmp_path / "lacking.so")])
    library = build.build_library(tmp_path / "kernels.so")
    done = subprocess.run([sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True,
                          env=os.environ | {"LD_PRELOAD": str(tmp_path / "lacking.so")})
    assert done.stdout == "[(256, 512), (256, 4)]\n", done.stderr


def test_reports_are_read():
    log = """ptxas info    : Compiling entry function '_Z3foov' for 'sm_80'
ptxas info    : Function properties for _Z3foov
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers"""
    assert build.read_reports(log) == [build.Report("_Z3foov", "sm_80", 168, 16, 12)]


def test_an_object_depends_on_what_its_source_includes():
    users = {kernel for kernel in build.KERNELS
             if build.SOURCES / "hopper.cuh" in build.included(build.SOURCES / kernel)}
    assert users == {"gemm_fp8.cu"}
    assert all(build.SOURCES / "kernels.h" in build.included(source) for source in build.BINDINGS)


COMPILER = """#!/bin/sh
echo once more >> "$(dirname "$0")/runs"
sleep 1
for argument; do output=$argument; done
echo object > "$output"
"""
BUILD = """
import importlib.util, sys
from pathlib import Path
script, folder = map(Path, sys.argv[1:])
spec = importlib.util.spec_from_file_location("csrc_build", script)
build = sys.modules["csrc_build"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.CACHE = folder / "cache"
print("ready", flush=True)
sys.stdin.readline()
print(build._cached([str(folder / "compiler")], folder / "kernel.cu", ".o")[0].read_text(), end="")
"""


def test_one_of_two_processes_compiles(tmp_path):
    """Two that need an object at once both get it. The compiler notes each run, and takes a second."""
    (tmp_path / "kernel.cu").touch()
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler").chmod(0o755)
    command = [sys.executable, "-c", BUILD, str(ROOT / "csrc" / "build.py"), str(tmp_path)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.stdout.readline() for each in both] == ["ready\n"] * 2
    for each in both:
        each.stdin.write("go\n")
        each.stdin.flush()
    assert [each.communicate()[0] for each in both] == ["object\n"] * 2
    assert (tmp_path / "runs").read_text() == "once more\n"


def test_planted_mistakes_are_still_where_they_were(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "emulation")
    mistakes = load("emulation_mistakes", ROOT / "tests" / "emulation" / "mistakes.py").MISTAKES
    moved = [each.name for each in mistakes if each.old not in (build.SOURCES / each.file).read_text()]
    assert not moved
    assert f"plants {len(mistakes)} mistakes in csrc/" in (ROOT / "docs" / "kernels.md").read_text()
    tests = {each.tests if "/" in each.tests else f"gpu/{each.tests}" for each in mistakes}
    assert all((ROOT / "tests" / path).is_file() for path in tests)
    assert len({(each.file, each.old, each.new) for each in mistakes}) == len(mistakes)
