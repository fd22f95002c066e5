"""Functions of layers as graphs: each equals the function, takes any number of tokens, and is one that a module has.

The backend is aot_eager, whose graphs are the compiler's, forward and backward, run by torch's own operators.
"""

from dataclasses import replace

import pytest
import torch
from small_models import LLAMA_SMALL, V3_SMALL, whole_stage
from small_trainers import batch_of, trainer

from megatron_deepseek.model import compiled
from megatron_deepseek.model.build import Precision, shape_stages
from megatron_deepseek.model.compiled import FUSIBLES, check_compiler, compile_stages, fusibles_of
from megatron_deepseek.model.router import route
from megatron_deepseek.ops.cross_entropy import CrossEntropy, cross_entropy_gradient, cross_entropy_statistics
from megatron_deepseek.ops.fusible import Graph
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.rope import apply_rope_to_halves, assemble_keys, rope_queries
from megatron_deepseek.ops.swiglu import swiglu
from megatron_deepseek.torch_private import compiled_so_far

BY_FUNCTION = {each.function: each for each in FUSIBLES}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def leaf(*shape: int) -> torch.Tensor:
    return numbers(*shape).requires_grad_()


def statistics_and(tokens: int) -> tuple[torch.Tensor, ...]:
    logits, labels = numbers(tokens, 12), torch.arange(tokens) * 5 % 20
    return logits, labels, 4, *cross_entropy_statistics(logits, labels, 4)[:2], numbers(tokens)


ARGUMENTS = {
    rms_norm: lambda t: (leaf(2, t, 6), leaf(6), 1e-6),
    swiglu: lambda t: (leaf(t, 8),),
    rope_queries: lambda t: (leaf(1, t, 2, 10), numbers(2, t, 2), 6),
    assemble_keys: lambda t: (leaf(1, t, 2, 10), leaf(1, t, 4), numbers(2, t, 2), 6),
    apply_rope_to_halves: lambda t: (leaf(1, t, 2, 10), numbers(2, t, 4)),
    route: lambda t: (leaf(t, 8), numbers(8), None, replace(V3_SMALL, n_routed_experts=8, n_group=2, topk_group=1)),
    cross_entropy_statistics: lambda t: (numbers(t, 12), torch.arange(t) * 5 % 20, 4),
    cross_entropy_gradient: statistics_and,
}


def results(function, args) -> list[torch.Tensor]:
    """The outputs, then the gradients of all that has one."""
    made = function(*args)
    made = [*made] if isinstance(made, tuple) else [made]
    wanted = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    outputs = [each for each in made if each.requires_grad]
    return made + [*torch.autograd.grad(sum((each.square()).sum() for each in outputs), wanted)] if wanted else made


@pytest.mark.parametrize("function", FUSIBLES, ids=lambda fusible: fusible.function.__name__)
def test_a_graph_computes_what_its_function_does_for_any_number_of_tokens(function):
    """One graph for all numbers from 2 on; of 1 and of 0 there is another each, or none."""
    graph, make = Graph(function, "aot_eager"), ARGUMENTS[function.function]
    seen = []
    for tokens in (7, 1, 0, 5, 12, 3, 1, 0):
        torch.testing.assert_close(results(graph, make(tokens)), results(function.function, make(tokens)))
        seen.append(compiled_so_far()[0])
    assert set(seen[2:]) == {seen[2]} and seen[2] <= seen[0] + 2 * (function.least == 1), seen


@pytest.mark.parametrize("config", [V3_SMALL, LLAMA_SMALL], ids=["experts", "llama"])
def test_modules_hold_graphs_in_place_of_functions(meshes, config):
    """All of a function that there are: norms wherever they stand, SwiGLU within GEMMs, the loss in the head."""
    stages = shape_stages(config, [whole_stage(config)], meshes, 8)
    compile_stages(stages, "eager", GPU)
    (stage,) = stages
    held = [value for module in stage.modules() for value in vars(module).values()]
    held += [gemm.swiglu for gemm in held if hasattr(gemm, "swiglu")]
    held += [stage.head.cross_entropy.statistics, stage.head.cross_entropy.gradient]
    assert not [each for each in held if callable(each) and each.__hash__ and each in BY_FUNCTION]
    graphs = {each.function for each in held if isinstance(each, Graph)}
    others = {rope_queries, assemble_keys, route} if config is LLAMA_SMALL else {apply_rope_to_halves}
    assert graphs == BY_FUNCTION.keys() - others


def test_what_is_slower_as_a_graph_on_a_cpu_is_none_there():
    assert fusibles_of(GPU) == [*FUSIBLES]
    assert {each.function for each in FUSIBLES} - {each.function for each in fusibles_of(CPU)} == {assemble_keys, route}


def test_functions_are_left_where_nothing_is_compiled(meshes):
    (stage,) = shape_stages(V3_SMALL, [whole_stage(V3_SMALL)], meshes, 8)
    assert not [value for module in stage.modules() for value in vars(module).values() if isinstance(value, Graph)]
    assert stage.head.cross_entropy == CrossEntropy()


def test_what_a_compiler_lacks_is_told_in_a_line(monkeypatch, tmp_path):
    check_compiler(CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"^--compile needs a C\+\+ compiler: no-such-compiler is not on the path .*$"):
        check_compiler(CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="^--compile needs Python's headers: .* has no Python.h"):
        check_compiler(CPU)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^--compile needs Triton"):
        check_compiler(torch.device("cuda", 0))


@pytest.mark.slow
def test_the_compiler_itself_gives_the_losses_and_gradients(meshes):
    """With inductor's own kernels, in float32, two steps: the second loss is of weights that the first step updated."""
    both = [trainer(meshes, precision=Precision(torch.float32), compiler=each) for each in (None, "inductor")]
    for step in range(2):
        one, other = (each.train_step(batch_of(4, step), 1e-2) for each in both)
        assert other.losses.lm_loss == pytest.approx(one.losses.lm_loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for (name, expected), (_, got) in zip(*(each.stages[0].named_parameters() for each in both), strict=True):
        torch.testing.assert_close(got.grad.to_local(), expected.grad.to_local(), rtol=1e-3, atol=1e-5,
                                   msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
def test_fp8_products_stand_between_graphs(meshes):
    """Graphs round to bfloat16 where the functions do, so that the same numbers are quantised."""
    fp8 = Precision(torch.float32, torch.bfloat16, fp8=True)
    both = [trainer(meshes, precision=fp8, compiler=each) for each in (None, "aot_eager")]
    for step in range(2):
        one, other = (each.train_step(batch_of(4, step), 1e-2) for each in both)
        assert other.losses.lm_loss == pytest.approx(one.losses.lm_loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
    (stage,) = both[1].stages
    assert {type(module.gemm).__name__ for module in stage.modules() if hasattr(module, "gemm")} >= {"Fp8Gemm"}
