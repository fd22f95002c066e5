"""No reference dispatches, alone or inside another, forward or backward: on a GPU it stays what torch computes.

Else a kernel would be compared with itself there, and a benchmark's baseline would partly be the kernel.
"""

import pytest
import torch
from references import REFERENCES, plain
from torch.utils._pytree import tree_leaves

from megatron_deepseek.ops.attention import Scores
from megatron_deepseek.ops.backends import registry
from megatron_deepseek.ops.fp8.block_scaled import quantize, share


def numbers(*shape: int, leaf: bool = True) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().requires_grad_(leaf)


def arguments() -> dict[str, tuple]:
    experts = torch.tensor([[0, 2], [1, 0], [2, 1]])
    order, inverse, _ = plain.sort_by_expert(experts, 3)
    table, labels, counts = torch.randn(2, 3, 4), torch.tensor([1, 2, 0]), [2, 0, 1]
    x, wide, weight = numbers(3, 24), numbers(3, 24, leaf=False), numbers(24)
    rstd, stack = torch.rand(3, 1), numbers(3, 16, 24, leaf=False)
    heads = [numbers(1, 2, 3, 8, leaf=False)] * 3
    rows, columns = plain.quantize_1x128(wide), plain.quantize_128x1(wide, False, counts)
    top, total, _ = plain.cross_entropy_statistics(wide, labels, 0)
    return {
        "attention": (*(numbers(1, 3, 2, 8) for _ in range(3)), None, 0.3, 8),
        "attend": (*heads, Scores(0.3, causal=True)),
        "attend_backward": (heads[0], *heads, *plain.attend(*heads, Scores(0.3)), Scores(0.3)),
        "cross_entropy_statistics": (wide, labels, 0),
        "cross_entropy_gradient": (wide, labels, 0, top, total, torch.rand(3)),
        "rms_norm": (x, weight, 1e-6), "norm_backward": (wide, wide, weight, rstd),
        "norm_quantize": (wide, weight.detach(), 1e-6, True),
        "norm_backward_quantize": (wide, wide, weight.detach(), rstd),
        "gather_rows": (wide, labels), "sort_by_expert": (experts, 3),
        "permute": (numbers(6, 24), order, inverse), "copy_and_permute": (x, order, inverse),
        "weighted_sum": (numbers(6, 24), torch.rand(3, 2).requires_grad_(), order, inverse),
        "rope_queries": (numbers(1, 3, 2, 24), table, 16),
        "assemble_keys": (numbers(1, 3, 2, 24), numbers(1, 3, 8), table, 16),
        "quantize_1x128": (wide,), "quantize_128x128": (wide,), "quantize_both_ways": (wide,),
        "quantize_e5m6": (wide,), "dequantize_e5m6": (*plain.quantize_e5m6(wide), 24),
        "retile_e5m6": (*plain.quantize_e5m6(wide), 24, True, counts),
        "quantize_128x1": (wide, False, counts), "quantize_rows_and_columns": (wide, False, counts),
        "retile_128x1": (*rows, False, counts), "quantize_swiglu": (wide, wide, True),
        "quantize_swiglu_columns": (wide, wide, True, counts),
        "swiglu_backward_tiles": (wide, wide, wide, False, counts),
        "scaled_mm": (*rows, *plain.quantize_128x128(wide)),
        "grouped_scaled_mm": (*rows, *plain.quantize_128x128(stack), counts),
        "grouped_scaled_mm_wgrad": (*columns, *columns, counts)}


def arguments_in_tiles() -> dict[str, tuple]:
    """What operators take as tiles, too: BlockScaled, whose own operations must not dispatch either."""
    order, inverse, _ = plain.sort_by_expert(torch.tensor([[0, 2], [1, 0], [2, 1]]), 3)
    rows, tokens, wide = share(numbers(6, 24)), share(numbers(3, 24)), numbers(3, 24, leaf=False)
    kept = quantize(wide)
    return {"permute": (rows, order, inverse), "copy_and_permute": (tokens, order, inverse),
            "quantize_swiglu_columns": (kept, kept, True, [2, 0, 1]),
            "swiglu_backward_tiles": (wide, kept, kept, False, [2, 0, 1])}


def test_every_reference_is_known():
    assert set(REFERENCES) == set(registry.CANDIDATES) == set(arguments())


@pytest.fixture
def no_backend(monkeypatch):
    """Return a function after which whoever asks the registry for a backend fails."""
    def refuse(x):
        raise AssertionError("a reference asks for a backend")

    return lambda: monkeypatch.setattr(registry, "on_gpu", refuse)


@pytest.mark.parametrize("name", registry.CANDIDATES)
def test_reference(name, no_backend):
    given = arguments()[name]
    no_backend()
    results = [y for y in tree_leaves(REFERENCES[name](*given)) if isinstance(y, torch.Tensor) and y.requires_grad]
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    if results and leaves:
        torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results], allow_unused=True)


@pytest.mark.parametrize("name", arguments_in_tiles())
@pytest.mark.parametrize("in_tiles", [False, True])
def test_reference_of_tiles(name, in_tiles, no_backend):
    """The gradient comes in numbers or in tiles."""
    given = arguments_in_tiles()[name]
    upstream = numbers(6, 24, leaf=False)
    upstream = quantize(upstream) if in_tiles else upstream
    no_backend()
    result = REFERENCES[name](*given)
    if isinstance(result, torch.Tensor):
        torch.autograd.grad(result, given[0], upstream)
