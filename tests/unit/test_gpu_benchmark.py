"""The baselines of benchmarks/gpu.py are torch and the references: on a GPU none of them may call a kernel of csrc/."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_deepseek.ops.backends import registry

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu
from gpu_pieces import kernels as pieces
from gpu_pieces.timing import Bench, Case, Ceilings, Row, as_json

PIECES = ("quantize", "routing", "rotary", "cross_entropy", "attend", "products", "grouped_products",
          "references_agree")


@dataclass(frozen=True)
class Baselines(Bench):
    """Calls every implementation but csrc's once, and notes which."""

    called: list[str] = field(default_factory=list)

    def rows(self, case):
        for name, call in case.calls.items():
            if name.startswith("csrc"):
                continue
            try:
                call()
            except (RuntimeError, ValueError):  # of cuBLASLt and cuDNN, on a CPU
                assert name in case.on_a_gpu
            self.called.append(f"{case.name}: {name}")
        return ()


@pytest.mark.parametrize("name", PIECES)
def test_baselines_ask_for_no_backend(name, monkeypatch):
    def refuse(*_):
        raise AssertionError(f"a baseline of {name} is not torch's alone")

    monkeypatch.setattr(registry, "on_gpu", refuse)
    monkeypatch.setattr(pieces, "operator", refuse)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    bench = Baselines(name, torch.device("cpu"), small=True)
    list(getattr(pieces, name)(bench))
    assert bench.called


def test_what_only_a_gpu_has_is_left_out_elsewhere_and_said():
    """No row without a time has a problem then: tools/gpu_check.sh counts those as failures."""
    case = Case("x", {"torch": lambda: torch.ones(2), "cuBLASLt": lambda: 1 / 0, "broken": lambda: 1 / 0}, flops=1,
                on_a_gpu=("cuBLASLt",))
    torchs, left_out, broken = map(as_json, Bench("a piece", torch.device("cpu"), small=True).rows(case))
    assert torchs["microseconds"] > 0 and "more" not in torchs
    assert left_out == {"piece": "a piece", "case": "x", "backend": "cuBLASLt",
                        "more": {"left_out": "no kernel for cpu"}}
    assert broken["problem"].startswith("ZeroDivisionError")


def test_a_piece_that_takes_too_long_says_so(tmp_path):
    args = SimpleNamespace(device="cpu", small=True, emulated=False, timeout=0.01)
    assert gpu.in_own_process("routing", args, Ceilings(1.0, 1.0), tmp_path / "rows") == [
        Row("routing", "", "", problem="not done in 0.01 s")]


NOT_INSTALLED = """
import sys
from pathlib import Path
sys.path[:] = [path for path in sys.path if not Path(path, "megatron_deepseek").exists()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""


@pytest.mark.slow
def test_it_finds_the_package_by_itself(tmp_path):
    """Where it is not installed, from any directory."""
    (tmp_path / "sitecustomize.py").write_text(NOT_INSTALLED)
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--help"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
