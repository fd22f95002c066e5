"""torch.compile and FakeTensor see the kernels through what models call (ops/backends/cuda/), every one of them.

Each call is compiled as one graph and its results are compared with the reference's, its backward included; and made of
tensors without data, which must have the shapes, dtypes and strides of real results.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from functorch.compile import make_boxed_func
from references import plain
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_deepseek.ops import cross_entropy, permute, rope
from megatron_deepseek.ops.backends import kernels, registry
from megatron_deepseek.ops.backends.cuda.operands import table, tile_rows
from megatron_deepseek.ops.fp8 import e5m6, encoding, gemm, norm as fp8_norm, recipe
from megatron_deepseek.ops.fp8.block_scaled import share

COUNTS = [40, 0, 100]


def bf16(*shape: int, device, leaf: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=device).bfloat16().requires_grad_(leaf)


@dataclass(frozen=True)
class Call:
    """A function that dispatches, its arguments, and the kernels that it and its derivative need."""

    function: Callable
    arguments: tuple
    kernels: frozenset[str]


def call(function: Callable, *arguments, kernels: str) -> Call:
    return Call(function, arguments, frozenset(kernels.split()))


def kept_swiglu(grad, q, scale) -> list[torch.Tensor]:
    """Both kernels of tiles that were kept, whose callers have a subclass that torch.compile does not trace."""
    q_columns, s_columns = kernels.operator("kept_swiglu_quantize_columns")(q, scale, q, scale, None, True)
    rows = kernels.operator("kept_swiglu_backward_quantize")(grad, q, scale, q, scale, None, False)[:2]
    return [q_columns[:, :len(grad)], s_columns, *rows]


def kept_swiglu_reference(grad, q, scale) -> list[torch.Tensor]:
    x = encoding.dequantize_1x128(q, scale, torch.bfloat16)
    ((rows, _),) = plain.swiglu_backward_tiles(grad, x, x, True)
    return [*plain.quantize_swiglu_columns(x, x, True), *rows]


kept_swiglu.reference = kept_swiglu_reference


def calls(device) -> dict[str, Call]:
    x, table = bf16(140, 136, device=device), torch.randn(2, 3, 4, device=device)
    experts = torch.rand(70, 3, device=device).topk(2, -1).indices
    order, inverse, _ = plain.sort_by_expert(experts, 3)
    weights = torch.rand(70, 2, device=device, requires_grad=True)
    labels, rstd = torch.randint(136, (140,), device=device), torch.rand(140, 1, device=device)
    statistics = plain.cross_entropy_statistics(x, labels, 0)[:2]
    scale, stack = torch.rand(136, device=device), bf16(3, 72, 136, device=device)
    rows, blocks = plain.quantize_1x128(x, True), plain.quantize_128x128(stack)
    columns, packed = plain.quantize_128x1(x), plain.quantize_e5m6(x)
    return {
        "rope_queries": call(rope.rope_queries, bf16(2, 3, 4, 24, device=device, leaf=True), table, 16,
                             kernels="rope_tail"),
        "assemble_keys": call(rope.assemble_keys, bf16(2, 3, 4, 24, device=device, leaf=True),
                              bf16(2, 3, 8, device=device, leaf=True), table, 16,
                              kernels="keys_values keys_values_backward"),
        "cross_entropy": call(cross_entropy.cross_entropy_statistics, x, labels, 0, kernels="cross_entropy_statistics"),
        "its gradient": call(cross_entropy.cross_entropy_gradient, x, labels, 0, *statistics,
                             torch.rand(140, device=device), kernels="cross_entropy_gradient_"),
        "sort_by_expert": call(permute.sort_by_expert, experts, 3, kernels="route"),
        "copy_and_permute": call(permute.copy_and_permute, bf16(70, 136, device=device, leaf=True), order, inverse,
                                 kernels="gather_rows combine_rows"),
        "permute": call(permute.permute, bf16(140, 136, device=device, leaf=True), order, inverse,
                        kernels="gather_rows"),
        "weighted_sum": call(permute.weighted_sum, bf16(140, 136, device=device, leaf=True), weights, order, inverse,
                             kernels="combine_rows combine_backward"),
        "gather_rows": call(permute.gather_rows, x, labels, kernels="gather_rows"),
        "quantize_1x128": call(encoding.quantize_1x128, x[:, 8:72], kernels="quantize_rows"),
        "quantize_128x1": call(encoding.quantize_128x1, x, kernels="quantize_columns"),
        "quantize_128x128": call(encoding.quantize_128x128, stack, kernels="quantize_blocks"),
        "quantize_both_ways": call(encoding.quantize_both_ways, stack, kernels="quantize_blocks"),
        "retile_128x1": call(encoding.retile_128x1, *rows, True, kernels="retile_columns"),
        "quantize_e5m6": call(e5m6.quantize_e5m6, x, kernels="quantize_e5m6"),
        "dequantize_e5m6": call(e5m6.dequantize_e5m6, *packed, 136, torch.bfloat16, kernels="dequantize_e5m6"),
        "retile_e5m6": call(e5m6.retile_e5m6, *packed, 136, True, kernels="retile_e5m6"),
        "both": call(encoding.quantize_rows_and_columns, x, kernels="quantize_both"),
        "swiglu": call(recipe.quantize_swiglu, x, x, True, kernels="swiglu_quantize_rows"),
        "swiglu, columns": call(recipe.quantize_swiglu_columns, x, x, True, kernels="swiglu_quantize_columns"),
        "swiglu, backward": call(recipe.swiglu_backward_tiles, x, x, x, True, kernels="swiglu_backward_quantize"),
        "kept swiglu": call(kept_swiglu, x, *rows,
                            kernels="kept_swiglu_quantize_columns kept_swiglu_backward_quantize"),
        "norm": call(fp8_norm.norm_quantize, x, scale, 1e-6, True, kernels="norm_quantize_rows"),
        "norm, backward": call(fp8_norm.norm_backward_quantize, x, x, scale, rstd, kernels="norm_backward_quantize"),
        "product": call(gemm.scaled_mm, *rows, *(part[0] for part in blocks), kernels="scaled_mm"),
        "wgrad": call(gemm.scaled_mm, *columns, *columns, torch.float32, kernels="scaled_mm"),
        "grouped product": call(gemm.grouped_scaled_mm, *rows, *blocks, COUNTS, kernels="grouped_scaled_mm"),
        "grouped wgrad": call(gemm.grouped_scaled_mm_wgrad, *plain.quantize_128x1(x, False, COUNTS),
                              *plain.quantize_128x1(x, False, COUNTS), COUNTS, kernels="grouped_scaled_mm_wgrad")}


NAMES = tuple(calls(torch.device("cpu")))


def with_gradients(function: Callable, arguments: tuple) -> list[torch.Tensor]:
    """Return results, and the gradients of leaves for gradients of results that are the results' own numbers."""
    results = tensors(function(*arguments))
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    if leaves:
        results += torch.autograd.grad(results, leaves, [y.detach().clone() for y in results])
    return results


def tensors(result) -> list[torch.Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


def agree(got: torch.Tensor, expected: torch.Tensor) -> None:
    """By norm: two roundings to bfloat16, 2^-8 each, and a few codes that rounded the other way, a sixteenth each."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error < 2**-6, float(error)


def names_of(targets) -> set[str]:
    return {str(target).split(".")[1] for target in targets if str(target).startswith(kernels.NAMESPACE)}


def test_every_kernel_and_every_operator_that_has_one_is_called(device):
    made = calls(device).values()
    assert frozenset().union(*(each.kernels for each in made)) == set(kernels.FAKES)
    ours = {operator for operator, candidates in registry.CANDIDATES.items()
            if any(candidate.name == "csrc" for candidate in candidates)}
    assert {each.function.__name__ for each in made} == {*ours, kept_swiglu.__name__}


@pytest.mark.parametrize("name", NAMES)
def test_compiled(device, name):
    """As one graph: a break in it would be an error."""
    one, seen = calls(device)[name], []

    def noted(graph, inputs):
        for node in graph.graph.nodes:  # one that works in place is the argument of a node that makes it functional
            seen.extend((node.target, *node.args))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    # a kernel that works in place overwrites what is compared
    given = [tuple(x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
                   for x in one.arguments) for _ in range(2)]
    compiled = torch.compile(one.function, fullgraph=True, backend=aot_autograd(fw_compiler=noted, bw_compiler=noted))
    got, expected = with_gradients(compiled, given[0]), with_gradients(one.function.reference, given[1])
    for mine, wanted in zip(got, expected, strict=True):
        agree(mine, wanted)
    assert names_of(seen) == one.kernels


class Watching(TorchDispatchMode):
    """Notes every operation, and how many tensors or numbers passed between the host and the device."""

    def __init__(self):
        super().__init__()
        self.operations, self.crossings = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append(function)
        devices = {x.device.type for x in tensors((args, kwargs, result))}
        self.crossings += len(devices) > 1 or str(function) == "aten._local_scalar_dense.default"
        return result


@pytest.mark.parametrize("name", NAMES)
def test_without_data(device, name):
    """Derivatives are traced above."""
    one = calls(device)[name]
    with torch.no_grad():
        expected = tensors(one.function(*one.arguments))
        with FakeTensorMode(), Watching() as watching:
            arguments = tree_map_only(torch.Tensor, lambda x: torch.empty_strided(
                x.shape, x.stride(), dtype=x.dtype, device=device), one.arguments)
            got = tensors(one.function(*arguments))
    for mine, wanted in zip(got, expected, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert set() < names_of(watching.operations) <= one.kernels


def test_a_step_of_known_counts_copies_nothing_from_the_host(device):
    """As the capture of a CUDA graph demands: experts forward and backward in FP8, on the meta device for a GPU."""
    forms, counts = recipe.recipe(), [71, 0, 185]  # of no other test
    x, up, down = (torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in (
        (256, 256), (3, 256, 256), (3, 256, 128)))

    def step() -> Watching:
        with Watching() as watching:
            hidden = forms.experts_up(forms.experts_up.rows(x), up, counts)
            forms.experts_down.after_swiglu((hidden,), down, counts).sum().backward()
        return watching

    first, second = step(), step()
    assert first.crossings and not second.crossings
    assert {"grouped_scaled_mm", "grouped_scaled_mm_wgrad", "retile_columns"} <= names_of(second.operations)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def norms_and_linears():
    forms = recipe.recipe()
    between = forms.norm_of_product(forms.linear(forms.norm(meta(64, 256), meta(256), 1e-6), meta(384, 256)),
                                    meta(384), 1e-6)
    return forms.linear(between, meta(256, 384))


def attention_and_its_output():
    forms = recipe.recipe()
    heads = forms.attention(meta(1, 64, 2, 192), meta(1, 64, 2, 192), meta(1, 64, 2, 192), None, 0.1, 128)
    return forms.attention_output(heads, meta(256, 256))


def dense_layer():
    linear = recipe.recipe().linear
    return linear.after_swiglu((linear(meta(64, 256), meta(512, 256)),), meta(256, 256))


def copies_of_tiles():
    places = torch.empty(128, dtype=torch.int64, device="meta")
    return permute.copy_and_permute(share(meta(64, 256), True), places, places)


@pytest.mark.parametrize("step, wanted", [
    (norms_and_linears, "norm_quantize_rows norm_backward_quantize quantize_both retile_columns scaled_mm"),
    (attention_and_its_output, "quantize_e5m6 dequantize_e5m6 retile_e5m6 scaled_mm"),
    (dense_layer, "swiglu_quantize_rows kept_swiglu_quantize_columns kept_swiglu_backward_quantize scaled_mm"),
    (copies_of_tiles, "gather_rows combine_rows")])
def test_what_has_no_experts_copies_nothing_from_the_host(device, step, wanted):
    with Watching() as watching:
        step().sum().backward()
    assert not watching.crossings
    assert set(wanted.split()) <= names_of(watching.operations)


def test_captured(device):
    """A CUDA graph of products of experts gives, replayed on other numbers, what the calls give."""
    if device.type != "cuda":
        pytest.skip("graphs are captured on a GPU")
    x, stack = bf16(140, 136, device=device), bf16(3, 72, 136, device=device)
    blocks = encoding.quantize_128x128(stack)

    def step() -> torch.Tensor:
        return gemm.grouped_scaled_mm(*encoding.quantize_1x128(x), *blocks, COUNTS)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # tables are kept for each stream: the capture must find them
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            y = step()
        for rows in range(600):  # more tables than are kept: those of the graph must stay
            table(tile_rows, [rows, *COUNTS], x)
    torch.cuda.current_stream().wait_stream(side)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, step())
