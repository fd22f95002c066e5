"""What a run says at its start about its kernels: which it has on this GPU, what is slow here, what would be faster."""

from collections.abc import Iterable, Mapping

from megatron_deepseek.device import compute_capability, has_accelerator
from megatron_deepseek.ops.backends import registry
from megatron_deepseek.ops.backends.registry import CANDIDATES, REFERENCE, Choice

PRODUCTS = ("scaled_mm", "grouped_scaled_mm", "grouped_scaled_mm_wgrad")
_TABLE = "python -m megatron_deepseek.ops lists them"


def is_of_fp8(operator: str) -> bool:
    """Return whether only runs in FP8 call the operator."""
    return any(part in operator for part in ("quantize", "scaled_mm", "retile", "tiles"))


def describe_kernels(fp8: bool) -> list[str]:
    """Return the lines of a run, with FP8 or without, on this machine; none on a CPU.

    Raise ValueError for wishes (MEGATRON_DEEPSEEK_OPS) that cannot be fulfilled.
    """
    if not has_accelerator():
        return []
    chosen = {operator: choice for operator, choice in registry.choices().items() if fp8 or not is_of_fp8(operator)}
    major, minor = compute_capability()
    counts = ", ".join(f"{backend} for {len(operators)}" for backend, operators in _by_backend(chosen).items())
    return [f"kernels on compute capability {major}.{minor}: {counts} operators; {_TABLE}",
            *_slow(chosen), *_faster(chosen)]


def _by_backend(chosen: Mapping[str, Choice]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for operator, choice in chosen.items():
        found.setdefault(choice.backend, []).append(operator)
    return found


def _slow(chosen: Mapping[str, Choice]) -> list[str]:
    """Return warnings of operators that only the reference computes here: FP8 products first, which cost most."""
    slow = [choice for choice in chosen.values() if choice.backend == REFERENCE]
    products = [choice for choice in slow if choice.operator in PRODUCTS]
    lines = []
    if products:
        lines.append(f"warning: FP8 products are loops of float32 products here, many times slower than bfloat16 "
                     f"({products[0].why}); without --fp8-format this run would be faster")
    for why, operators in _by_reason(choice for choice in slow if choice not in products).items():
        lines.append(f"warning: slow, each in several steps of torch: {len(operators)} operators, {operators[0]} among "
                     f"them ({why})")
    return lines


def _by_reason(choices: Iterable[Choice]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for choice in choices:
        found.setdefault(choice.why, []).append(choice.operator)
    return found


def _faster(chosen: Mapping[str, Choice]) -> list[str]:
    """Return hints at backends that this GPU could use and that are not there.

    Of those before the chosen one, which the registry holds for faster, the reference's warning has told already. Of
    those after it only attention's is named: transformer-engine has cuDNN's fused attention.
    """
    passed = _by_reason(choice for choice in chosen.values()
                        if choice.backend != REFERENCE and choice.why not in ("first choice", _asked_for()))
    lines = [f"faster if it were here: {', '.join(operators)} ({why})" for why, operators in passed.items()]
    attention = chosen.get("attention")
    for candidate in CANDIDATES["attention"]:
        if attention and candidate.name != attention.backend and (problem := candidate.why_not()):
            lines.append(f"attention may be faster with {candidate.name}: {problem}, and it is used on request only")
    return lines


def _asked_for() -> str:
    return f"{registry.ENVIRONMENT} names it"
