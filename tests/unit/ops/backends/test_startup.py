"""What a run says of its kernels, on GPUs that are not here."""

import re
from types import SimpleNamespace

import pytest
import torch
from forked import run_script

from megatron_deepseek.model.architecture.presets import TINY
from megatron_deepseek.ops.backends import kernels, registry
from megatron_deepseek.ops.backends.startup import describe_kernels, is_of_fp8
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.runtime import resume


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Return a function that makes this machine one with a GPU of a compute capability, csrc/ built or not."""
    def make(capability: tuple[int, int], built: bool, cuda: str = "13.0") -> None:
        library = tmp_path / "library.so"
        if built:
            library.touch()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(kernels, "LIBRARY", library)
        monkeypatch.setattr(kernels, "is_loaded", lambda: True)
        clear()

    def clear() -> None:
        registry.choices.cache_clear()
        getattr(registry, "_no_library").cache_clear()

    yield make
    clear()


def test_hopper_has_everything(gpu):
    gpu((9, 0), built=True)
    first, *others = describe_kernels(fp8=True)
    assert first == "kernels on compute capability 9.0: torch for 5, csrc for 26 operators; " \
                    "python -m megatron_deepseek.ops lists them"
    assert others == ["attention may be faster with transformer_engine: transformer-engine is not installed, and it is "
                      "used on request only"]


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)], ids=["A100", "Blackwell"])
def test_products_that_are_loops_are_a_warning(gpu, capability):
    gpu(capability, built=True)
    lines = describe_kernels(fp8=True)
    (slow,) = (line for line in lines if "warning" in line)
    assert slow == ("warning: FP8 products are loops of float32 products here, many times slower than bfloat16 "
                    "(products with block scales need compute capability 9.0, this GPU has {}.{}); without "
                    "--fp8-format this run would be faster".format(*capability))
    assert not [line for line in describe_kernels(fp8=False) if "warning" in line]


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)], ids=["A100", "Blackwell"])
def test_what_no_installation_mends_is_the_only_reason(gpu, capability):
    """Nobody is told to build csrc/ or to install a library for products that this GPU cannot compute with it."""
    gpu(capability, built=False, cuda="12.6")
    slow, others = (line for line in describe_kernels(fp8=True) if "warning" in line)
    assert "products with block scales need compute capability 9.0" in slow
    assert "csrc" not in slow and "CUDA 12.9" not in slow and "installed" not in slow
    assert "python csrc/build.py builds it" in others


def test_a_gpu_that_csrc_is_not_compiled_for(gpu):
    gpu((7, 5), built=True)
    first, *others = describe_kernels(fp8=False)
    assert "csrc for" not in first
    assert any("csrc/ is compiled for GPUs of compute capability 8.0, this GPU has 7.5" in line for line in others)
    (oldest,) = re.findall(r'^PORTABLE = \("(\d+)"', (kernels.SOURCES / "build.py").read_text(), re.M)
    assert registry.OLDEST == divmod(int(oldest), 10)


def test_hopper_without_csrc(gpu):
    """torch's products serve; the rest is slow, and says what would help."""
    gpu((9, 0), built=False)
    lines = describe_kernels(fp8=True)
    assert "torch for 8" in lines[0]
    why = "(csrc/ is not built; python csrc/build.py builds it (docs/kernels.md))"
    assert f"warning: slow, each in several steps of torch: 23 operators, norm_quantize among them {why}" in lines
    assert f"faster if it were here: scaled_mm, grouped_scaled_mm, grouped_scaled_mm_wgrad {why}" in lines


STALE = """
import sys
import torch
from pathlib import Path
from megatron_deepseek.ops.backends import kernels, registry
from megatron_deepseek.ops.backends.startup import describe_kernels
library = torch.library.Library(kernels.NAMESPACE, "DEF")

def load_library(path):
    for name, text in kernels.declarations().items():
        if name != sys.argv[1]:
            library.define(text.replace(*sys.argv[2:4]))

torch.ops.load_library = load_library
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (9, 0)
torch.version.cuda = "13.0"
kernels.LIBRARY = Path(__file__)
print(*describe_kernels(fp8=True), sep="\\n")
"""


@pytest.mark.parametrize("missing, old, new, said", [
    ("none", "none", "none", None), ("retile_e5m6", "none", "none", "retile_e5m6"),
    ("none", "int num_experts, int align", "int num_experts", "route")])
def test_a_library_of_other_sources_is_a_reason(tmp_path, missing, old, new, said):
    """One that was kept while csrc/ got another operator, or other arguments of one: not a crash in the first step."""
    script = tmp_path / "stale.py"
    script.write_text(STALE)
    out, errors = tmp_path / "out", tmp_path / "errors"
    assert run_script([str(script), missing, old, new], out, errors) == 0, errors.read_text()
    lines = out.read_text()
    assert ("csrc for 26 operators" in lines) == (said is None)
    reason = f"was built of other sources: {said}; python csrc/build.py builds it again"
    assert (reason in lines) == (said is not None)


def test_a_cpu_says_nothing():
    assert describe_kernels(fp8=True) == []


def test_operators_of_fp8():
    assert {operator for operator in registry.CANDIDATES if not is_of_fp8(operator)} == {
        "rms_norm", "norm_backward", "attention", "attend", "attend_backward", "rope_queries",
        "assemble_keys", "sort_by_expert", "permute",
        "gather_rows", "copy_and_permute", "weighted_sum", "cross_entropy_statistics", "cross_entropy_gradient"}


def test_a_job_reports_it(monkeypatch):
    """Once, on the rank that describes the job."""
    layout = Layout()
    run = SimpleNamespace(bf16=True, fp8_format="e4m3", freeze_parameters=(), load=None, save=None)
    settings = SimpleNamespace(layout=layout, run=run, model=TINY, lora=None, notes=(), pipeline=None,
                               communication=SimpleNamespace(moe_ranks_per_node=None))
    trainer = SimpleNamespace(meshes=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(resume, "describe_kernels", lambda fp8: [f"kernels, fp8 {fp8}"])
    said: list[str] = []
    resume.describe(SimpleNamespace(message=said.append), settings, trainer, SimpleNamespace(notes=(), load=None), None)
    assert said.count("kernels, fp8 True") == 1
