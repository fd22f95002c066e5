"""Where the kernels run: on a GPU, or in the emulation that gives every GPU thread a fiber of the CPU.

Both run the same operators of the same source. The emulation is small and slow, and only there to find mistakes in
indices, barriers and arithmetic before a GPU is at hand; it runs where nvcc is, or with MEGATRON_DEEPSEEK_EMULATE=1.

There every tensor counts as a GPU's, so that whatever asks the registry gets a kernel, as on a GPU: a reference that
dispatched would be a kernel that is compared with itself.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from megatron_deepseek.ops.backends import kernels, registry

ROOT = Path(__file__).parents[2]


def load_build():
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        if not kernels.is_loaded():
            kernels.load()
        return torch.device("cuda")
    build = load_build()
    if build.find_nvcc() is None and not os.environ.get("MEGATRON_DEEPSEEK_EMULATE"):
        pytest.skip("no GPU; no emulation either: no nvcc, and MEGATRON_DEEPSEEK_EMULATE=1 was not set")
    if not kernels.is_loaded():
        kernels.load(Path(os.environ.get("EMULATED_LIBRARY") or build.build_emulation(build.CACHE / "emulated.so")))
    return torch.device("cpu")


def chosen_on_hopper() -> dict[str, registry.Choice]:
    """The choices of a GPU for which everything of csrc/ is there, and nothing else."""
    ours = {operator: candidate for operator, candidates in registry.CANDIDATES.items() for candidate in candidates
            if candidate.name == "csrc"}
    return {operator: registry.Choice(operator, "csrc", "emulated", ours[operator].load()) if operator in ours else
            registry.Choice(operator, registry.REFERENCE, "emulated") for operator in registry.CANDIDATES}


@pytest.fixture(autouse=True)
def dispatching(device, monkeypatch):
    if device.type != "cuda":
        choices = chosen_on_hopper()
        monkeypatch.setattr(registry, "on_gpu", lambda x: True)
        monkeypatch.setattr(registry, "choices", lambda: choices)


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    """Of numbers, and of the order in which the emulation runs threads: a random one finds missing barriers."""
    torch.manual_seed(0)
    monkeypatch.setenv("EMULATION_ORDER", "7")


@pytest.fixture(params=["forward", "7"])
def any_order(request, device, seed, monkeypatch) -> str:
    """A random order, and from the first thread to the last."""
    if device.type == "cuda" and request.param != "forward":
        pytest.skip("a GPU chooses its own order")
    monkeypatch.setenv("EMULATION_ORDER", request.param)
    return request.param
