"""What ptxas made of the GEMMs, read from their SASS: no step along K waits for scales, and every instruction of
Hopper's (csrc/hopper.cuh) is there as often as the form of the kernel needs it.

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


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    """Return the SASS of every GEMM by its name."""
    objects, _ = build.compile_kernels(jobs=2)
    gemm = next(path for path in objects if path.name.startswith("gemm_fp8-"))
    return dict(kernels(build.run_command([find_cuobjdump(), "-sass", str(gemm)])))


needs_compiler = pytest.mark.skipif(build.find_nvcc() is None or find_cuobjdump() is None,
                                    reason="no nvcc or no cuobjdump")


@pytest.mark.slow
@needs_compiler
def test_no_step_waits_for_scales(compiled):
    found = {name: problem(loops_of(text)) for name, text in compiled.items()}
    assert len(found) > 30 and not any(found.values()), {name: text for name, text in found.items() if text}


@dataclass(frozen=True)
class KernelForm:
    """What the name of a kernel says of it: csrc/gemm_kernel.cuh's `Form`."""

    blocks_b: bool
    waves: int
    by_copies: bool
    cluster: int


def form_of(name: str) -> KernelForm:
    digits = re.search(r"GroupingE\dELb(\d)ELi(\d)ELNS_5StoreE(\d)ELi(\d)E", name).groups()
    blocks, waves, store, cluster = map(int, digits)
    return KernelForm(bool(blocks), waves, bool(store), cluster)


def expected(form: KernelForm) -> dict[str, int]:
    """Return how often a kernel has each instruction, by hand: once for each half of a tile ("wave") that it
    multiplies, loads or stores, where the code of both is apart.
    """
    waves, alone, copies = form.waves, form.cluster == 1, form.waves * form.by_copies
    stages = {1: 6, 2: 4}[waves]
    return {
        "QGMMA.64x128x32.F32.E4M3.E4M3": 4 * waves, "WARPGROUP.ARRIVE": waves, "WARPGROUP.DEPBAR.LE": waves,
        "UTMALDG.2D": 1 + waves if alone else 1, "UTMALDG.2D.MULTICAST": 0 if alone else 1,
        "SYNCS.EXCH.64": 2 * stages,  # full and empty barriers are made
        "SYNCS.ARRIVE.TRANS64": 1,  # with the bytes that are to come
        "SYNCS.ARRIVE.TRANS64.A1T0": waves * alone, "SYNCS.ARRIVE.TRANS64.RED.A1T0": waves * (not alone),
        "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
        "UCGABAR_ARV": 0 if alone else 2, "UCGABAR_WAIT": 0 if alone else 2, "MEMBAR.ALL.GPU": 0 if alone else 2,
        "FENCE.VIEW.ASYNC.S": 1 + copies,  # barriers made, and numbers staged, for the copy engine
        "STSM.16.M88.4": 8 * copies, "UTMASTG.2D": 2 * copies, "UTMACMDFLUSH": copies,
        "DEPBAR.LE": copies + form.by_copies}


def code_of(sass: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass, re.M)


def opcode(text: str) -> str:
    return re.sub(r"^@\S+\s+", "", text).split()[0]


@pytest.mark.slow
@needs_compiler
def test_instructions_are_as_many_as_the_form_needs(compiled):
    for name, sass in compiled.items():
        found = [opcode(text) for text in code_of(sass)]
        wanted = expected(form_of(name))
        assert {each: found.count(each) for each in wanted} == wanted, name
    assert len({form_of(name) for name in compiled}) == 12


def documented(pattern: str) -> int:
    """Return the number that docs/kernels.md has in a sentence, whose lines may break anywhere."""
    page = (ROOT / "docs" / "kernels.md").read_text()
    found = re.findall(pattern.replace(" ", r"\s+"), page)
    assert len(set(found)) == 1, (pattern, found)
    return int(found[0])


@pytest.mark.slow
@needs_compiler
def test_the_documented_instructions(compiled):
    """Of bfloat16 results (the last letter of a kernel's types: t) with scales of blocks, and of wgrad's in float32."""
    if "release 13.0" not in build.run_command([build.find_nvcc(), "--version"]):
        pytest.skip("the page is of nvcc 13.0")

    def sass_of(waves: int, store: int = 0, cluster: int = 1, wgrad: bool = False) -> str:
        form = f"GroupingE{2 if wgrad else 0}ELb{int(not wgrad)}ELi{waves}ELNS_5StoreE{store}ELi{cluster}EEE"
        (found,) = [text for name, text in compiled.items() if form + ("f" if wgrad else "t") in name]
        return found

    def count(sass: str, start: str) -> int:
        return sum(opcode(text).startswith(start) for text in code_of(sass))

    step = {key: len(loops_of(sass_of(*key)).step) for key in (
        (waves, store, cluster, False) for waves in (1, 2) for store in (0, 1) for cluster in (1, 2))}
    tall, of_wgrad = sass_of(2), sass_of(2, wgrad=True)
    assert step[2, 0, 1, False] == documented(r"The tall kernel's step has (\d+) instructions")
    assert len(loops_of(of_wgrad).step) == documented(r"instructions, wgrad's (\d+) \(")
    assert (len(loaded(loops_of(tall).group)), len(loaded(loops_of(of_wgrad).group))) == (
        documented(r"a group's loads \((\d+), wgrad's \d+\)"), documented(r"a group's loads \(\d+, wgrad's (\d+)\)"))
    assert count(tall, "SHFL") - sum("SHFL" in text for text in loops_of(tall).step) == documented(
        r"the tall kernel's (\d+) shuffles")
    assert count(tall, "STG") == documented(r"its direct stores \((\d+) with those for edges\)")
    assert count(of_wgrad, "STG") == documented(r"without any shuffle \((\d+) `STG` a tall tile\)")
    by_copies = sass_of(2, 1)
    assert count(by_copies, "STSM") == documented(r"become (\d+) `STSM`")
    assert count(by_copies, "UTMASTG") == documented(r"`STSM` and (\d+) `UTMASTG`")
    assert step[2, 1, 1, False] - step[2, 0, 1, False] == 2  # "has two instructions more"
    clustered = {key: step[*key[:2], 2, False] - step[*key[:2], 1, False] for key in step if key[2] == 2}
    assert max(clustered.values()) <= documented(r"A step has at most (\d+) instructions more")


def wrong_operands(sass: str) -> list[str]:
    """Return instructions whose operands are others than a kernel's: sums that begin with what was there, waits that
    leave something open, a barrier of others than a consumer's 128 threads, other registers than 40 and 232.
    """
    code = code_of(sass)
    products = [text for text in code if "QGMMA" in text]
    right = re.compile(r"^QGMMA\.64x128x32\.F32\.E4M3\.E4M3 (R\d+), gdesc\[UR\d+\], (RZ, !UPT|\1)(, gsb0)?$")
    found = [text for i, text in enumerate(products) if not (said := right.match(text))
             or (i % 4 == 0) != (said[2] == "RZ, !UPT") or (i % 4 == 3) != bool(said[3])]
    ends = {"WARPGROUP.DEPBAR.LE": "gsb0, 0x0", "DEPBAR.LE": "SB0, 0x0", "USETMAXREG.DEALLOC.CTAPOOL": " 0x28",
            "USETMAXREG.TRY_ALLOC.CTAPOOL": " 0xe8"}
    found += [text for text in code if (end := ends.get(opcode(text))) and not text.endswith(end)]
    return found + [text for text in code if re.search(r"BAR\.SYNC\S* R\d+", text) and not text.endswith(", 0x80")]


@pytest.mark.slow
@needs_compiler
def test_operands(compiled):
    for name, sass in compiled.items():
        assert not wrong_operands(sass), name
        of_columns = len(re.findall(r"BAR\.SYNC\S* R\d+, 0x80", sass))
        assert of_columns == (0 if form_of(name).blocks_b else 1), name


GOOD = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   MOV R3, R4 ;
        /*0020*/                   LDG.E R4, desc[UR4][R8.64] ;
        /*0030*/                   SHFL.IDX PT, R9, R3, R7, 0x1f ;
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR20], RZ, !UPT ;
        /*0050*/              @!P0 BRA 0x30 ;
        /*0060*/              @!P1 BRA 0x10 ;
"""


@pytest.mark.parametrize("sass, found", [
    (GOOD, None),
    (GOOD.replace("R9, R3", "R9, R4"), "a step has ['R4'], which its group loads"),
    (GOOD.replace("SHFL.IDX PT, R9, R3, R7, 0x1f", "LDG.E R5, desc[UR4][R8.64]"), "a step loads from global memory")])
def test_problems_are_found(sass, found):
    assert problem(loops_of(sass)) == found


OPERANDS = """
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR20], RZ, !UPT ;
        /*0050*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24 ;
        /*0060*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR20], R24 ;
        /*0070*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR20], R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING R5, 0x80 ;
        /*00a0*/              @!P0 DEPBAR.LE SB0, 0x0 ;
        /*00b0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*00c0*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
"""


@pytest.mark.parametrize("right, wrong", [
    ("RZ, !UPT", "R24"), ("R24, gsb0", "RZ, !UPT, gsb0"), (", gsb0 ;", " ;"), ("E4M3.E4M3 R24, gdesc[UR16]",
                                                                            "E4M3.E5M2 R24, gdesc[UR16]"),
    ("gsb0, 0x0", "gsb0, 0x1"), ("SB0, 0x0", "SB0, 0x1"), ("0x80", "0x100"), ("UP0, 0xe8", "UP0, 0xf0"),
    ("CTAPOOL 0x28", "CTAPOOL 0x18")])
def test_wrong_operands_are_found(right, wrong):
    assert not wrong_operands(OPERANDS) and right in OPERANDS
    assert len(wrong_operands(OPERANDS.replace(right, wrong))) == 1
