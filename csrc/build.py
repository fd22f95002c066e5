"""Compile csrc/: for GPUs by nvcc, or for the CPU with every thread emulated (tests/emulation). No torch is imported.

    python csrc/build.py [--if-useful | --or-keep | --emulated] [--output PATH] [--jobs N]

`make venv` calls it with --if-useful, setup.py calls `build_library`, the tests `build_emulation` and
`compile_kernels`. Objects are kept in build/csrc/ under a hash of everything that they were made from, so nothing is
compiled twice.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent
EMULATION = ROOT / "tests" / "emulation"
CACHE = ROOT / "build" / "csrc"
LIBRARY = ROOT / "megatron_deepseek" / "ops" / "libmegatron_deepseek.so"  # ops/backends/kernels.py loads it from there
FORCE = "MEGATRON_DEEPSEEK_CUDA"  # an environment variable: 0 never builds, 1 builds or fails
OLDEST_TORCH = "0x020b000000000000"  # 2.11, whose stable ABI the library uses
KERNELS = ("rope.cu", "cross_entropy.cu", "route.cu", "permute.cu", "quantize.cu", "e5m6.cu", "gemm_fp8.cu")
BINDINGS = sorted(SOURCES.glob("*_binding.cpp"))
HOPPER_ONLY = ("gemm_fp8.cu",)  # wgmma and TMA; other GPUs use torch's FP8 GEMMs
PORTABLE = ("80", "90a")
NUMERICS = ["-std=c++17", "-fmad=false"]  # fused multiply-adds would round differently from the references


@dataclass(frozen=True)
class Report:
    """What ptxas reports of one kernel."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int


def find_nvcc() -> str | None:
    """Return the nvcc of $CUDA_HOME, of the PATH, or of /usr/local/cuda; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed: its headers are needed to build csrc/")
    return Path(spec.origin).parent


def why_not() -> str | None:
    """Return why a build would be of no use here, None where it would. Raise RuntimeError where it is forced and
    impossible.

    Without CUDA in torch the library could be compiled and never loaded.
    """
    force = os.environ.get(FORCE)
    if force not in (None, "", "0", "1"):
        raise RuntimeError(f"{FORCE} must be 0 or 1, is {force!r}")
    if force == "0":
        return f"{FORCE}=0"
    if find_nvcc() is None:
        if force == "1":
            raise RuntimeError(f"{FORCE}=1, but nvcc was not found")
        return "nvcc was not found"
    if force == "1":
        return None
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed yet"
    version = re.search(r"^cuda\b.*= *(.+)$", (torch_directory() / "version.py").read_text(), re.MULTILINE)
    return "this torch has no CUDA" if version is None or version.group(1) == "None" else None


def architectures(kernel: str) -> tuple[str, ...]:
    return ("90a",) if kernel in HOPPER_ONLY else PORTABLE


def run_command(command: list[str]) -> str:
    """Return what the command wrote. Raise RuntimeError with that if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def included(source: Path) -> set[Path]:
    """Return the source and the files of this project that it includes, and that these include."""
    found, todo = set(), [source]
    while todo:
        path = todo.pop()
        found.add(path)
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        files = {folder / name for folder in (SOURCES, EMULATION) for name in names if (folder / name).exists()}
        todo += files - found
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made if need be; wait while another process or thread holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cached(command: list[str], source: Path, suffix: str) -> tuple[Path, str]:
    """Return the object that `command` makes of `source`, and what the compiler wrote when it was made.

    Of several processes that need it at once, as `make test` starts, one compiles it.
    """
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(included(source)):
        digest.update(path.read_bytes())
    made = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}{suffix}"
    log = made.with_suffix(".log")
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(made.with_suffix(".lock")):
        if not (made.exists() and log.exists()):
            partial = made.with_suffix(f".{os.getpid()}.partial.o")
            log.write_text(run_command([*command, str(source), "-o", str(partial)]))
            partial.rename(made)
    return made, log.read_text()


def _all(calls: list, jobs: int) -> list:
    with ThreadPoolExecutor(jobs) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def kernel_command(nvcc: str, kernel: str) -> list[str]:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures(kernel)]
    if kernel not in HOPPER_ONLY:
        codes.append("-gencode=arch=compute_90,code=compute_90")  # for later GPUs
    return [nvcc, *NUMERICS, "-O3", *codes, "-Xptxas", "-v", "-Xcompiler", "-fPIC", "--threads", "2", "-c"]


def compile_kernels(jobs: int = 2) -> tuple[list[Path], list[Report]]:
    """Return objects of all kernels for all their architectures, and ptxas' reports. Raise RuntimeError without nvcc.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: neither in CUDA_HOME, on the PATH nor in /usr/local/cuda")
    made = _all([lambda k=k: _cached(kernel_command(nvcc, k), SOURCES / k, ".o") for k in KERNELS], jobs)
    return [path for path, _ in made], [report for _, log in made for report in read_reports(log)]


def read_reports(log: str) -> list[Report]:
    """Return the report of every entry function in a log of `-Xptxas -v`."""
    reports = []
    for part in log.split("Compiling entry function '")[1:]:
        name, architecture = re.match(r"(\S+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        reports.append(Report(name, architecture, registers, stack, stores + loads))
    return reports


def _bind(emulated: bool, jobs: int) -> list[Path]:
    """Return the objects of every file that registers operators."""
    command = _binding_command(emulated)
    return [path for path, _ in _all([lambda s=s: _cached(command, s, ".o") for s in BINDINGS], jobs)]


def _binding_command(emulated: bool) -> list[str]:
    kind = ["-DMEGATRON_DEEPSEEK_EMULATED", f"-I{EMULATION}"] if emulated else ["-DUSE_CUDA"]
    return [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", *kind,
            f"-I{torch_directory() / 'include'}", "-c"]


def build_library(output: Path, jobs: int = 2) -> Path:
    """Build the library of the GPU's kernels.

    It asks for libtorch.so by name alone, which is loaded once torch is imported, and finds libtorch_cuda through that:
    a torch without CUDA, beside which it may be compiled, does not have libtorch_cuda.
    """
    objects, _ = compile_kernels(jobs)
    objects += _bind(False, jobs)
    output.parent.mkdir(parents=True, exist_ok=True)
    run_command([find_nvcc(), "-shared", "-cudart", "static", "-o", str(output), *map(str, objects),
          f"-L{torch_directory() / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"])
    return output


def build_emulation(output: Path, jobs: int = 2, extra: tuple[str, ...] = ()) -> Path:
    """Build the same operators for CPU tensors, every GPU thread a fiber. `extra` are flags, such as a sanitizer's."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-Wall", "-Wno-unknown-pragmas",
               "-DMEGATRON_DEEPSEEK_EMULATED", f"-I{EMULATION}", *extra, "-x", "c++", "-c"]
    calls = [lambda k=k: _cached(command, SOURCES / k, ".o") for k in KERNELS]
    objects = [path for path, _ in _all(calls, jobs)] + _bind(True, jobs)
    libraries = torch_directory() / "lib"
    output.parent.mkdir(parents=True, exist_ok=True)
    run_command([compiler, "-shared", "-o", str(output), *map(str, objects), *extra,
          f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"])
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emulated", action="store_true", help="for CPU tensors, every GPU thread a fiber")
    parser.add_argument("--if-useful", action="store_true",
                        help=f"only with nvcc and CUDA in torch, or as {FORCE} says")
    parser.add_argument("--or-keep", action="store_true", help="where nvcc is not found, keep a library that is there")
    parser.add_argument("--output", type=Path, help="default: where megatron_deepseek looks for it, or build/csrc/")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    try:
        problem = why_not() if args.if_useful else None
        if problem:
            print(f"csrc/ was not built: {problem}. Everything runs on the references.")
        elif args.or_keep and find_nvcc() is None and (args.output or LIBRARY).exists():
            print(f"nvcc was not found: {args.output or LIBRARY} stays as it is")
        elif args.emulated:
            print(build_emulation(args.output or CACHE / "emulated.so", args.jobs))
        else:
            print(build_library(args.output or LIBRARY, args.jobs))
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
