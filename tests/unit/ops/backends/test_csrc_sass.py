"""What ptxas made of the GEMMs' loops, read from their SASS: no step along K waits for scales.

Needs cuobjdump, which comes with the extra `test`, and with CUDA's toolkit.
"""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def find_cuobjdump() -> str | None:
    """Return that of the wheels nvidia-cuda-cuobjdump and -nvdisasm, which it calls and finds beside itself; else that
    of the PATH or of /usr/local/cuda.
    """
    wheels = importlib.util.find_spec("nvidia")
    folders = list(wheels.submodule_search_locations) if wheels else []
    candidates = [str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/cuobjdump"))]
    return next(filter(None, map(shutil.which, [*candidates, "cuobjdump", "/usr/local/cuda/bin/cuobjdump"])), None)


@dataclass(frozen=True)
class Loops:
    """The instructions of the loop over steps, and of what is around it in the loop over groups of steps."""

    step: list[str]
    group: list[str]


def loops_of(sass: str) -> Loops:
    """Return the innermost loop with products of tensor cores in a kernel's SASS, and the next one around it."""
    code = [(int(address, 16), text) for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    place = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for last, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        first = place.get(int(target[1], 16)) if target else None
        if first is not None and first <= last and any("QGMMA" in each for _, each in code[first:last + 1]):
            found.append((last - first, first, last))
    _, first, last = min(found)
    outer_first, outer_last = next((a, b) for _, a, b in sorted(found) if a < first and b >= last)
    texts = [text for _, text in code]
    return Loops(texts[first:last + 1], texts[outer_first:first] + texts[last + 1:outer_last + 1])


def loaded(code: list[str]) -> set[str]:
    """Return the registers that loads of global memory write."""
    return {found[1] for text in code if (found := re.search(r"\bLDG\S* (R\d+)", text))}


def problem(loops: Loops) -> str | None:
    """Return what a step would wait for."""
    if loaded(loops.step):
        return "a step loads from global memory"
    early = loaded(loops.group) & set(re.findall(r"\bR\d+\b", " ".join(loops.step)))
    return f"a step has {sorted(early)}, which its group loads" if early else None


def kernels(sass: str) -> Iterator[tuple[str, str]]:
    for part in sass.split("Function : ")[1:]:
        yield part.split("\n")[0], part


@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None or find_cuobjdump() is None, reason="no nvcc or no cuobjdump")
def test_no_step_waits_for_scales():
    objects, _ = build.compile_kernels(jobs=2)
    gemm = next(path for path in objects if path.name.startswith("gemm_fp8-"))
    found = {name: problem(loops_of(text)) for name, text in kernels(build.run_command(
        [find_cuobjdump(), "-sass", str(gemm)]))}
    assert len(found) > 30 and not any(found.values()), {name: text for name, text in found.items() if text}


GOOD = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   MOV R3, R4 ;
        /*0020*/                   LDG.E R4, desc[UR4][R8.64] ;
        /*0030*/                   SHFL.IDX PT, R9, R3, R7, 0x1f ;
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR20], RZ, !UPT ;
        /*0050*/              @!P0 BRA 0x30 ;
        /*0060*/              @!P1 BRA 0x10 ;
"""


@pytest.mark.parametrize("sass, expected", [
    (GOOD, None),
    (GOOD.replace("R9, R3", "R9, R4"), "a step has ['R4'], which its group loads"),
    (GOOD.replace("SHFL.IDX PT, R9, R3, R7, 0x1f", "LDG.E R5, desc[UR4][R8.64]"), "a step loads from global memory")])
def test_problems_are_found(sass, expected):
    assert problem(loops_of(sass)) == expected
