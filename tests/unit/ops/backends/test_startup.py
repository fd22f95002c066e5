"""What a run says of its kernels, on GPUs that are not here."""

from types import SimpleNamespace

import pytest
import torch

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
    assert "FP8 products are loops of float32" in slow and f"this GPU has {capability}" in slow
    assert not [line for line in describe_kernels(fp8=False) if "warning" in line]


def test_hopper_without_csrc(gpu):
    """torch's products serve; the rest is slow, and says what would help."""
    gpu((9, 0), built=False)
    lines = describe_kernels(fp8=True)
    assert "torch for 8" in lines[0]
    assert any(line.startswith("warning: slow, in several steps of torch: ") and "quantize_1x128" in line
               and "csrc/ is not built (docs/kernels.md)" in line for line in lines)
    assert "faster if it were here: scaled_mm, grouped_scaled_mm, grouped_scaled_mm_wgrad " \
           "(csrc/ is not built (docs/kernels.md))" in lines


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
