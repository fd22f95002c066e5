"""The implementation that each operator uses on a GPU, chosen once a process; CPU tensors always use the reference.

    @with_backends("rms_norm")
    def rms_norm(x, weight, eps): ...          the reference, in torch

The first candidate that can be used here is taken, or the one that the environment names:
MEGATRON_DEEPSEEK_OPS=rms_norm=apex,attention=torch, where `all=torch` means every operator that has such a candidate.
`python -m megatron_deepseek.ops` prints the choice and the reasons. An implementation may return NotImplemented for
arguments that it does not take (a dtype, a width); the reference is called then.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from megatron_deepseek.device import compute_capability, has_accelerator, on_accelerator, stands_in

ENVIRONMENT = "MEGATRON_DEEPSEEK_OPS"
REFERENCE = "reference"
OLDEST = (8, 0)  # the compute capability that csrc/build.py compiles for


@dataclass(frozen=True)
class Candidate:
    """A backend that an operator may use.

    `function` is module:name of the implementation in this folder, None for the reference itself. `why_not` returns
    None where the candidate can be used, else the reason why it cannot.
    """

    name: str
    function: str | None
    why_not: Callable[[], str | None]

    def load(self) -> Callable | None:
        if self.function is None:
            return None
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"megatron_deepseek.ops.backends.{module}"), name)


@dataclass(frozen=True)
class Choice:
    """The backend that an operator uses for CUDA tensors; `function` is None for the reference."""

    operator: str
    backend: str
    why: str
    function: Callable | None = None


def _always() -> None:
    return None


@functools.cache
def _no_library() -> str | None:
    """Return why the operators of csrc/ cannot be used; load them where there is a GPU to use them on."""
    from megatron_deepseek.ops.backends import kernels

    if has_accelerator() and compute_capability() < OLDEST:
        return _needs("csrc/ is compiled for GPUs of", OLDEST)
    if not kernels.LIBRARY.exists():
        return "csrc/ is not built; python csrc/build.py builds it (docs/kernels.md)"
    if has_accelerator() and not kernels.is_loaded():
        try:
            kernels.load()
        except OSError as error:
            return f"csrc/ does not load: {error}"
    return None


def _needs(what: str, capability: tuple[int, int]) -> str:
    """Return that `what` needs a compute capability that this GPU does not have."""
    wanted, own = ("{}.{}".format(*each) for each in (capability, compute_capability()))
    return f"{what} compute capability {wanted}, this GPU has {own}"


def _not_hopper(what: str = "products with block scales need") -> str | None:
    return None if not has_accelerator() or compute_capability()[0] == 9 else _needs(what, (9, 0))


# What no installation mends is said first: the GPU, then the library.

def _no_hopper() -> str | None:
    return _not_hopper() or _no_library()


def _no_module(name: str, library: str) -> str | None:
    """Return why a module cannot be used, without importing it: that fails in odd ways where it has no GPU."""
    return None if importlib.util.find_spec(name) else f"{library} is not installed"


def _no_apex() -> str | None:
    """Return why NVIDIA's apex cannot be used, by its compiled module: PyPI's `apex` is something else."""
    return _no_module("fused_layer_norm_cuda", "apex")


def _no_transformer_engine() -> str | None:
    return _no_module("transformer_engine", "transformer-engine")


def _no_cudnn() -> str | None:
    """Return why cuDNN's attention cannot be used: it takes keys of 192 with values of 128 from 9.11 on, on Hopper."""
    version = torch.backends.cudnn.version() or 0
    return _not_hopper("cuDNN's attention of such widths needs") or (
        None if version >= 91100 else f"needs cuDNN 9.11, this torch has {version or 'none'}")


def _no_blockwise_gemm() -> str | None:
    """Return why torch's GEMM cannot be used: cuBLASLt has such scales for Hopper alone, from CUDA 12.9 on."""
    version = torch.version.cuda
    if version is None:
        return "this torch has no CUDA"
    old = tuple(map(int, version.split(".")[:2])) < (12, 9)
    return _not_hopper() or (f"needs CUDA 12.9, this torch has {version}" if old else None)


def _no_transformer_engine_gemm() -> str | None:
    return _not_hopper() or _no_transformer_engine()


def _ours(function: str) -> tuple[Candidate, ...]:
    return Candidate("csrc", f"cuda.{function}", _no_library), Candidate(REFERENCE, None, _always)


def _forms(function: str, *forms: str) -> tuple[Candidate, ...]:
    """Return forms of a product of csrc/ that are used where they are asked for, until they have run on a GPU."""
    return tuple(Candidate(f"csrc_{form}", f"cuda.gemm:{function}_{form}", _no_hopper) for form in forms)


CANDIDATES: Mapping[str, tuple[Candidate, ...]] = MappingProxyType({
    "rms_norm": (Candidate("torch", "alternatives:torch_rms_norm", _always),
                 Candidate("apex", "alternatives:apex_rms_norm", _no_apex),
                 Candidate(REFERENCE, None, _always)),
    "norm_backward": (Candidate("torch", "alternatives:torch_norm_backward", _always),
                      Candidate(REFERENCE, None, _always)),
    "norm_quantize": _ours("quantize:norm_quantize"),
    "norm_backward_quantize": _ours("quantize:norm_backward_quantize"),
    "attention": (Candidate("torch", None, _always),
                  Candidate("transformer_engine", "alternatives:transformer_engine_attention", _no_transformer_engine)),
    "attend": (Candidate("torch", None, _always), Candidate("cudnn", "alternatives:cudnn_attend", _no_cudnn)),
    "attend_backward": (Candidate("torch", None, _always),
                        Candidate("cudnn", "alternatives:cudnn_attend_backward", _no_cudnn)),
    "rope_queries": _ours("layers:rope_queries"),
    "assemble_keys": _ours("layers:assemble_keys"),
    "sort_by_expert": _ours("layers:sort_by_expert"),
    "permute": _ours("layers:permute"),
    "gather_rows": _ours("layers:gather_rows"),
    "copy_and_permute": _ours("layers:copy_and_permute"),
    "weighted_sum": _ours("layers:weighted_sum"),
    "cross_entropy_statistics": _ours("layers:cross_entropy_statistics"),
    "cross_entropy_gradient": _ours("layers:cross_entropy_gradient"),
    "quantize_1x128": _ours("quantize:quantize_1x128"),
    "quantize_128x1": _ours("quantize:quantize_128x1"),
    "quantize_128x128": _ours("quantize:quantize_128x128"),
    "quantize_both_ways": _ours("quantize:quantize_both_ways"),
    "quantize_rows_and_columns": _ours("quantize:quantize_rows_and_columns"),
    "retile_128x1": _ours("quantize:retile_128x1"),
    "quantize_e5m6": _ours("quantize:quantize_e5m6"),
    "dequantize_e5m6": _ours("quantize:dequantize_e5m6"),
    "retile_e5m6": _ours("quantize:retile_e5m6"),
    "quantize_swiglu": _ours("quantize:quantize_swiglu"),
    "quantize_swiglu_columns": _ours("quantize:quantize_swiglu_columns"),
    "swiglu_backward_tiles": _ours("quantize:swiglu_backward_tiles"),
    "scaled_mm": (Candidate("csrc", "cuda.gemm:scaled_mm", _no_hopper),
                  *_forms("scaled_mm", "tma_store", "clusters", "clusters_tma_store"),
                  Candidate("torch", "alternatives:torch_scaled_mm", _no_blockwise_gemm),
                  Candidate("transformer_engine", "alternatives:transformer_engine_scaled_mm",
                            _no_transformer_engine_gemm),
                  Candidate(REFERENCE, None, _always)),
    "grouped_scaled_mm": (Candidate("csrc", "cuda.gemm:grouped_scaled_mm", _no_hopper),
                          *_forms("grouped_scaled_mm", "tma_store", "clusters", "clusters_tma_store"),
                          Candidate("torch", "alternatives:torch_grouped_scaled_mm", _no_blockwise_gemm),
                          Candidate(REFERENCE, None, _always)),
    "grouped_scaled_mm_wgrad": (Candidate("csrc", "cuda.gemm:grouped_scaled_mm_wgrad", _no_hopper),
                                *_forms("grouped_scaled_mm_wgrad", "clusters"),
                                Candidate("torch", "alternatives:torch_grouped_scaled_mm_wgrad", _no_blockwise_gemm),
                                Candidate(REFERENCE, None, _always)),
})


def parse_wishes(text: str) -> Mapping[str, str]:
    """Return operator -> backend from ENVIRONMENT's value. Raise ValueError for names that don't exist."""
    wishes: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        operator, _, backend = part.partition("=")
        known = {name for candidates in CANDIDATES.values() for name in (c.name for c in candidates)}
        if operator != "all" and operator not in CANDIDATES:
            raise ValueError(f"{ENVIRONMENT}: there is no operator {operator!r}; there are {', '.join(CANDIDATES)}")
        names = known if operator == "all" else {candidate.name for candidate in CANDIDATES[operator]}
        if backend not in names:
            raise ValueError(f"{ENVIRONMENT}: {operator} has no backend {backend!r}; it has {', '.join(sorted(names))}")
        for name in CANDIDATES if operator == "all" else (operator,):
            if operator != "all" or any(candidate.name == backend for candidate in CANDIDATES[name]):
                wishes[name] = backend
    return wishes


def choose(operator: str, wish: str | None) -> Choice:
    """Return the backend of `operator`. Raise ValueError if the one that is wished for cannot be used."""
    if not has_accelerator():
        return Choice(operator, REFERENCE, "no GPU")
    passed_over = []
    for candidate in CANDIDATES[operator]:
        if wish not in (None, candidate.name):
            continue
        problem = candidate.why_not()
        if problem is None:
            why = f"{ENVIRONMENT} names it" if wish else "; ".join(dict.fromkeys(passed_over)) or "first choice"
            return Choice(operator, candidate.name, why, candidate.load())
        if wish is not None:
            raise ValueError(f"{ENVIRONMENT}: {operator}={wish}, but {problem}")
        passed_over.append(problem)
    raise AssertionError(operator)


@functools.cache
def choices() -> Mapping[str, Choice]:
    """Return the choices of this process, made at the first call."""
    wishes = parse_wishes(os.environ.get(ENVIRONMENT, ""))
    return MappingProxyType({operator: choose(operator, wishes.get(operator)) for operator in CANDIDATES})


@functools.cache
def choices_of_stand_ins() -> Mapping[str, Choice]:
    """Return what a Hopper GPU with csrc/ chooses, for tensors that stand for a GPU's and compute nothing.

    Without csrc/ itself, of which the sources are enough, that is the references.
    """
    from megatron_deepseek.ops.backends import kernels

    kernels.declare()
    first = {operator: next(each for each in candidates if each.name != "csrc" or kernels.is_loaded())
             for operator, candidates in CANDIDATES.items()}
    return MappingProxyType({operator: Choice(operator, candidate.name, "dry run", candidate.load())
                             for operator, candidate in first.items()})


def choices_for(x: torch.Tensor) -> Mapping[str, Choice]:
    """Return the choices for x, which is on a GPU or stands for a tensor there."""
    return choices_of_stand_ins() if stands_in(getattr(x, "q", x)) else choices()


def on_gpu(x: torch.Tensor) -> bool:
    """Return whether x, or the codes of a block-scaled x, is on a GPU or stands for a tensor there."""
    return on_accelerator(getattr(x, "q", x))


def with_backends(operator: str):
    """Make the decorated function the reference of `operator`, used unless its first argument is on a GPU."""
    def decorate(reference):
        @functools.wraps(reference)
        def call(x, *args, **kwargs):
            if on_gpu(x):
                function = choices_for(x)[operator].function
                result = NotImplemented if function is None else function(x, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return reference(x, *args, **kwargs)

        call.reference = reference
        return call

    return decorate
