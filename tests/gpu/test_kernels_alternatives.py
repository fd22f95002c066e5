"""Operators of other libraries, on a GPU that has them: torch's, cuDNN's, apex', transformer-engine's.

They have no emulation: without a GPU tests/unit/ops/backends/test_alternatives.py holds their adapters to stand-ins.
"""

from collections.abc import Callable

import pytest
import torch
from references import REFERENCES, plain
from torch.utils._pytree import tree_leaves

from megatron_deepseek.ops import attention
from megatron_deepseek.ops.backends.registry import CANDIDATES, Candidate

COUNTS = [40, 0, 100]
ALTERNATIVES = [(operator, candidate) for operator, candidates in CANDIDATES.items() for candidate in candidates
                if (candidate.function or "").startswith("alternatives:")]
# What attention is by default on a GPU, torch's flash attention, is its own reference there: held to the definition.
DEFAULTS = [(operator, Candidate("torch", None, lambda: None)) for operator in ("attend", "attend_backward")]
EXPECTED = REFERENCES | {"attend": attention.plain_forward, "attend_backward": attention.plain_backward}


def arguments(device) -> dict[str, tuple]:
    """MLA's widths where they matter to attention; widths that every library takes elsewhere."""
    def bf16(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, weight, scores = bf16(140, 256), torch.rand(256, device=device).bfloat16(), attention.Scores(0.1, causal=True)
    q, k, v = bf16(2, 4, 160, 192), bf16(2, 4, 160, 192), bf16(2, 4, 160, 128)
    rows, blocks = plain.quantize_1x128(x), plain.quantize_128x128(bf16(144, 256))
    columns = plain.quantize_128x1(x, False, COUNTS)
    return {
        "rms_norm": (x, weight, 1e-6),
        "norm_backward": (bf16(140, 256), x, weight, (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()),
        "attention": (*(part.transpose(1, 2) for part in (q, k, v)), None, 0.1, 128),
        "attend": (q, k, v, scores),
        "attend_backward": (bf16(2, 4, 160, 128), q, k, v, *attention.plain_forward(q, k, v, scores), scores),
        "scaled_mm": (*rows, *blocks),
        "grouped_scaled_mm": (*rows, *plain.quantize_128x128(bf16(3, 144, 256)), COUNTS),
        "grouped_scaled_mm_wgrad": (*columns, *columns, COUNTS)}


def agree(got, expected) -> None:
    """By norm: each rounds to bfloat16 once or twice, 2^-8."""
    pairs = list(zip(*(tree_leaves(result) for result in (got, expected)), strict=True))
    assert pairs
    for mine, wanted in pairs:
        assert mine.shape == wanted.shape
        assert (mine.double() - wanted.double()).norm() < 2**-6 * wanted.double().norm()


def test_nothing_is_forgotten(device):
    assert {operator for operator, _ in ALTERNATIVES} == set(arguments(device))


@pytest.mark.parametrize("operator, candidate", [*ALTERNATIVES, *DEFAULTS],
                         ids=lambda part: part if isinstance(part, str) else part.name)
def test_agrees_with_the_reference(device, operator, candidate):
    if device.type != "cuda":
        pytest.skip("other libraries' kernels need a GPU")
    if problem := candidate.why_not():
        pytest.skip(problem)
    function: Callable = candidate.load() or REFERENCES[operator]
    given = arguments(device)[operator]
    agree(function(*given), EXPECTED[operator](*given))


@pytest.mark.parametrize("operator", sorted({operator for operator, _ in ALTERNATIVES}))
def test_a_wrong_result_is_seen(device, operator):
    """By these comparisons, wherever they run: the definition is itself, and not what has a row in another place."""
    given = arguments(device)[operator]
    expected = EXPECTED[operator](*given)
    agree(expected, expected)
    wrong = [part.roll(1, -2) for part in tree_leaves(expected) if part.ndim > 1]
    with pytest.raises(AssertionError):
        agree(wrong, [part for part in tree_leaves(expected) if part.ndim > 1])
