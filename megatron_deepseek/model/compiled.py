"""Compiles a built stage: its modules' functions between GEMMs, attention and collectives become graphs.

Modules hold these functions as attributes, or in their GEMMs, and do not know whether they are graphs. GEMMs,
attention's kernels and collectives are left as they are: a compiler calls the same kernels for them, while weight
gradients that wait for a W step, FP8, adapters and exchanges of tokens are not functions of tensors alone.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from megatron_deepseek.device import is_accelerator
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.router import route
from megatron_deepseek.ops.cross_entropy import (
    cross_entropy_gradient,
    cross_entropy_gradient_in_a_pass,
    cross_entropy_statistics,
)
from megatron_deepseek.ops.fusible import Fusible, Graphs
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.precision_recipe import Functions, Gemm
from megatron_deepseek.ops.rope import apply_rope_to_halves, assemble_keys, rope_queries
from megatron_deepseek.ops.rope_forms import assemble_keys_in_a_pass, rope_queries_in_a_pass, turn_halves_in_a_pass
from megatron_deepseek.ops.swiglu import swiglu

BACKEND = "inductor"
FUSIBLES = (
    Fusible(rms_norm, ((0, -2),)),
    Fusible(swiglu, ((0, -2), (1, -2)), least=2),
    Fusible(rope_queries, ((0, 1), (1, 1)), form=rope_queries_in_a_pass),
    Fusible(assemble_keys, ((0, 1), (1, 1), (2, 1)), least=2, form=assemble_keys_in_a_pass),
    Fusible(apply_rope_to_halves, ((0, 1), (1, 1)), form=turn_halves_in_a_pass),
    Fusible(route, ((0, 0), (2, 0))),
    Fusible(cross_entropy_statistics, ((0, 0), (1, 0))),
    Fusible(cross_entropy_gradient, ((0, 0), (1, 0), (3, 0), (4, 0), (5, 0)), form=cross_entropy_gradient_in_a_pass),
)
SLOWER_ON_CPU = frozenset({assemble_keys, route})  # as graphs than without (docs/benchmarks.md)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError, of one line, where torch.compile lacks what it makes kernels with on this machine."""
    if is_accelerator(device):
        missing = None if importlib.util.find_spec("triton") else "Triton, which torch's builds for GPUs bring along"
    else:
        missing = _missing_for_cpu(os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include")))
    if missing is not None:
        raise ValueError(f"--compile needs {missing}")


def _missing_for_cpu(compiler: str, headers: Path) -> str | None:
    """Return what kernels for the CPU lack: they are C++ with Python's interface."""
    if shutil.which(compiler) is None:
        return f"a C++ compiler: {compiler} is not on the path (the environment variable CXX names another)"
    if not (headers / "Python.h").exists():
        return f"Python's headers: {headers} has no Python.h (python3-dev or python3-devel has them)"
    return None


def fusibles_of(device: torch.device) -> list[Fusible]:
    """Return the functions that are worth a graph on `device`."""
    return [each for each in FUSIBLES if is_accelerator(device) or each.function not in SLOWER_ON_CPU]


def compile_stages(stages: Iterable[DeepseekStage], backend: str, device: torch.device) -> None:
    """Give all modules of `stages`, which run on `device`, graphs by a backend of torch.compile in place of their
    functions.
    """
    graphs = Graphs(fusibles_of(device), backend)
    for stage in stages:
        for module in stage.modules():
            _compile(module, graphs)
        if stage.stage.loss:
            stage.head.cross_entropy = stage.head.cross_entropy.compiled(graphs)


def _compile(module: nn.Module, graphs: Functions) -> None:
    for name, value in [*vars(module).items()]:
        if isinstance(value, Gemm):
            setattr(module, name, value.compiled(graphs))
        elif callable(value) and value.__hash__ is not None:
            setattr(module, name, graphs(value))
