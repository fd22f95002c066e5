"""Products of the FP8 recipe against their definition, and what they keep: counted, not believed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kept_memory import Watch, kept_by
from small_models import enliven, forward, gradients_of, random_batch, whole_model

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import Precision
from megatron_deepseek.ops.attention import attention
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled, bytes_of_row, quantize, share
from megatron_deepseek.ops.fp8.e5m6 import dequantize_e5m6, quantize_e5m6
from megatron_deepseek.ops.fp8.recipe import Fp8Gemm, recipe
from megatron_deepseek.ops.recompute import recomputed
from megatron_deepseek.parallel.zero_bubble import DeferredGradients
from megatron_deepseek.settings import RecomputeSettings

# Widths of several tiles: 128 features and more, 128 tokens.
MODEL = ModelConfig(
    vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
    moe_intermediate_size=128, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5)
FP8 = Precision(torch.float64, fp8=True)
COUNTS = [70, 0, 1, 129]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiled(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """x as a product sees its 1x128 tiles: without a rounding of code times scale."""
    q, scale = encoding.quantize_1x128(x, power_of_two)
    return q.double() * scale.double().repeat_interleave(128, -1)[..., :x.shape[-1]]


def kept_tiles(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """x as it is made again from its tiles, in float32."""
    return encoding.dequantize_1x128(*encoding.quantize_1x128(x, power_of_two), x.dtype)


def tiled_columns(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    return tiled(x.t(), power_of_two).t()


def blocked(weight: torch.Tensor) -> torch.Tensor:
    q, scale = encoding.quantize_128x128(weight)
    spread = scale.double().repeat_interleave(128, 0)[:weight.shape[0]].repeat_interleave(128, 1)
    return q.double() * spread[:, :weight.shape[1]]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def multiply(product: Fp8Gemm, swiglu: bool, *inputs: torch.Tensor, counts=()) -> torch.Tensor:
    *rows, weight = inputs
    return product.after_swiglu(rows, weight, *counts) if swiglu else product(*rows, weight, *counts)


def run(product: Fp8Gemm, *inputs: torch.Tensor, counts=(), swiglu=False):
    """Output and gradients, for an upstream gradient that depends on nothing."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = multiply(product, swiglu, *inputs, counts=counts)
    upstream = randn(*y.shape, seed=77)
    return y.detach(), upstream, torch.autograd.grad(y, inputs, upstream)


@pytest.mark.parametrize("input_power, dispatched, e5m6", [
    (False, False, False), (True, False, False), (False, True, False), (True, False, True)])
def test_linear_is_its_definition(input_power, dispatched, e5m6):
    """In float64 nothing rounds but what is quantised: 200 x 300 by 260 x 300, edges in every dimension."""
    x, weight = randn(200, 300), randn(260, 300, seed=1)
    product = Fp8Gemm(input_power, dispatched, e5m6)
    y, grad, (grad_x, grad_weight) = run(product, x, weight)
    kept = dequantize_e5m6(*quantize_e5m6(x), 300, x.dtype) if e5m6 else kept_tiles(x, input_power)
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, tiled(x, input_power) @ blocked(weight).t(), **close)
    torch.testing.assert_close(grad_x, tiled(grad, dispatched) @ blocked(weight), **close)
    seen = kept_tiles(grad, True) if dispatched else grad
    expected = tiled_columns(seen, dispatched).t() @ tiled_columns(kept, input_power)
    torch.testing.assert_close(grad_weight, expected, **close)
    assert (y - x @ weight.t()).norm() / y.norm() < 0.06  # two operands, each off by 2^-4 at most, 2^-5.2 in the mean


def test_after_swiglu_is_its_definition():
    """The forward is of the exact SwiGLU; its gradients and the weight's are of what FP8 kept of gate and up.

    The gradients of gate and up come in the tiles that the products before them read.
    """
    gate, up, weight = randn(130, 200), randn(130, 200, seed=1), randn(150, 200, seed=2)
    y, grad, gradients = run(Fp8Gemm(), gate, up, weight, swiglu=True)
    torch.testing.assert_close(y, tiled(swiglu(gate, up)) @ blocked(weight).t(), rtol=1e-12, atol=1e-12)
    kept = [kept_tiles(x).requires_grad_() for x in (gate, up)]
    hidden = swiglu(*kept)
    expected = torch.autograd.grad(hidden, kept, tiled(grad) @ blocked(weight))
    *of_inputs, of_weight = gradients
    torch.testing.assert_close(of_weight, tiled_columns(grad).t() @ tiled_columns(hidden.detach()), rtol=1e-11,
                               atol=1e-11)
    for got, wanted in zip(of_inputs, expected, strict=True):
        torch.testing.assert_close(got.plain(), kept_tiles(wanted), rtol=1e-6, atol=1e-11)
        torch.testing.assert_close(encoding.dequantize_1x128(*got.columns).double(), kept_tiles(wanted.t()), rtol=1e-6,
                                   atol=1e-11)


def test_gate_and_up_side_by_side():
    """One tensor of both, as experts have it: the same numbers where their tiles end between them, in one tiling."""
    gate, up, weight = randn(sum(COUNTS), 256), randn(sum(COUNTS), 256, seed=1), randn(len(COUNTS), 150, 256, seed=2)
    joint = torch.cat([gate, up], -1).requires_grad_()
    y = Fp8Gemm().after_swiglu((joint,), weight, COUNTS)
    expected, upstream, (*apart, _) = run(Fp8Gemm(), gate, up, weight, counts=(COUNTS,), swiglu=True)
    (got,) = torch.autograd.grad(y, joint, upstream)
    assert torch.equal(y, expected)
    assert torch.equal(got.q.float(), torch.cat([each.q.float() for each in apart], -1))
    assert all(torch.equal(got.columns[i].float(), torch.cat([each.columns[i].float() for each in apart]))
               for i in range(2))


@pytest.mark.parametrize("swiglu", [False, True])
def test_experts_are_linears_of_their_rows(swiglu):
    """Bit for bit, and nothing of an expert without rows."""
    rows, weight = sum(COUNTS), randn(len(COUNTS), 140, 200, seed=3)
    inputs = [randn(rows, 200, seed=i) for i in range(1 + swiglu)]
    product = Fp8Gemm(True, True)
    y, upstream, gradients = run(product, *inputs, weight, counts=(COUNTS,), swiglu=swiglu)
    for e, part in enumerate(zip(*(x.split(COUNTS) for x in (*inputs, y, upstream, *gradients[:-1])))):
        own, (y_e, upstream_e, *gradients_e) = [x.clone().requires_grad_() for x in part[:len(inputs)]], part[
            len(inputs):]
        if not COUNTS[e]:
            assert not gradients[-1][e].any()
            continue
        weight_e = weight[e].clone().requires_grad_()
        alone = multiply(product, swiglu, *own, weight_e)
        assert torch.equal(alone, y_e)
        *expected, expected_weight = torch.autograd.grad(alone, (*own, weight_e), upstream_e)
        assert all(map(torch.equal, gradients_e, expected)) and torch.equal(gradients[-1][e], expected_weight)


@pytest.mark.parametrize("counts, swiglu", [((), False), ((), True), ((COUNTS,), False), ((COUNTS,), True)])
def test_deferred_weight_gradients_are_the_same_bits(counts, swiglu):
    shape = (len(COUNTS), 140, 200) if counts else (140, 200)
    inputs, weight = [randn(sum(COUNTS), 200, seed=i) for i in range(1 + swiglu)], randn(*shape, seed=3)
    _, upstream, at_once = run(Fp8Gemm(), *inputs, weight, counts=counts, swiglu=swiglu)
    deferred = DeferredGradients()
    product = Fp8Gemm().deferring(deferred)
    own = [x.clone().requires_grad_() for x in (*inputs, weight)]
    multiply(product, swiglu, *own, counts=counts).backward(upstream)
    assert own[-1].grad is None
    deferred.take()()
    assert all(torch.equal(x.grad, expected) for x, expected in zip(own, at_once))


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_frozen_weight_has_no_gradient_to_defer(swiglu):
    inputs, weight, deferred = [randn(3, 200, seed=i) for i in range(1 + swiglu)], randn(140, 200), DeferredGradients()
    for product in (Fp8Gemm(), Fp8Gemm().deferring(deferred)):
        own = [x.clone().requires_grad_() for x in inputs]
        multiply(product, swiglu, *own, weight).sum().backward()
        deferred.take()()
        assert all(x.grad is not None for x in own) and weight.grad is None


@pytest.mark.parametrize("documents", [
    None, Documents.find(torch.tensor([0] * 40 + [0] * 7 + [1] * 32 + [2]).view(2, 40))], ids=["whole", "packed"])
def test_attention_reads_its_output_from_e5m6(documents):
    """The same output and, but for E5M6's 2^-7 on one term, the same gradients as attention that keeps it whole."""
    q, k = (randn(2, 40, 3, 24, seed=i) for i in range(2))
    v = F.pad(randn(2, 40, 3, 16, seed=2), (0, 8))
    outcomes = []
    for attend in (attention, recipe().attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, documents, 0.2, 16)
        outcomes.append((y.detach(), *torch.autograd.grad(y, inputs, randn(2, 40, 48, seed=4))))
    (exact, *exact_gradients), (got, *gradients) = outcomes
    assert isinstance(got, BlockScaled)
    torch.testing.assert_close(got.plain(), tiled(exact, True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[2], exact_gradients[2], rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(gradients[:2], exact_gradients[:2]):
        assert 1e-5 < (gradient - expected).norm() / expected.norm() < 2**-7


def kept_types(function) -> dict[torch.dtype, int]:
    """Bytes that autograd saved, by dtype; a storage once. Only what `function` made."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.dtype, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    sizes = {}
    for dtype, size in storages.values():
        sizes[dtype] = sizes.get(dtype, 0) + size
    del result
    return sizes


def test_what_is_kept_is_fp8():
    """Of 256 tokens x 512 features in bfloat16: codes of one byte, and a float32 for every 128 of them."""
    x = torch.randn(256, 512).bfloat16().requires_grad_()
    weight = torch.randn(128, 512).bfloat16().requires_grad_()
    size = 256 * 512
    assert kept_types(lambda: Fp8Gemm()(x, weight)) == {encoding.E4M3: size, torch.float32: size // 128 * 4}
    assert kept_types(lambda: Fp8Gemm(cache_e5m6=True)(x, weight)) == {
        torch.uint8: size * 3 // 2, torch.float32: size // 128 * 4}
    assert kept_types(lambda: Fp8Gemm().after_swiglu((x, x), weight)) == {
        encoding.E4M3: 2 * size, torch.float32: 2 * size // 128 * 4}
    both = Fp8Gemm()

    def twice():
        with both.shared(x) as shared:
            return both(shared, weight), both(shared, weight * 2)

    shared = kept_types(twice)
    assert shared[encoding.E4M3] == size


def test_attention_and_the_linear_after_it_keep_one_output():
    q, k, v = (torch.randn(1, 128, 2, 64).bfloat16().requires_grad_() for _ in range(3))
    weight = torch.randn(64, 128).bfloat16().requires_grad_()
    gemms = recipe()
    kept = kept_types(lambda: gemms.attention_output(gemms.attention(q, k, v, None, 0.1, 64), weight))
    assert kept == {torch.bfloat16: 3 * 128 * 2 * 64 * 2, torch.uint8: 128 * 128 * 3 // 2,
                    torch.float32: 2 * 128 * 4 + 128 * 4}  # log-sum-exp of 2 heads, one scale of each row


def test_gathered_rows_stay_fp8_and_anything_else_sees_numbers():
    x = randn(6, 200).bfloat16().requires_grad_()
    rows = share(x, power_of_two=True)
    gathered = rows.index_select(0, torch.tensor([5, 0, 0]))
    assert isinstance(gathered, BlockScaled) and gathered.dtype == torch.bfloat16
    assert torch.equal(gathered.q.float(), rows.q[[5, 0, 0]].float())
    assert bytes_of_row(gathered) == 200 + 2 * 4 and bytes_of_row(x) == 400
    added = gathered + 1
    assert type(added) is torch.Tensor and torch.equal(added, gathered.plain() + 1)
    (gradient,) = torch.autograd.grad(gathered.sum() + rows.sum(), x)
    assert gradient[:, 0].tolist() == [3, 1, 1, 1, 1, 2]


def test_a_gradient_that_came_as_fp8_is_used_as_it_came():
    """Quantised where its token is or at the expert, the same bits in every gradient."""
    inputs, grad = (randn(100, 200), randn(100, 200, seed=1), randn(140, 200, seed=2)), randn(100, 140, seed=3)
    product = Fp8Gemm(dispatched_gradient=True)
    gradients = []
    for upstream in (grad, quantize(grad, power_of_two=True)):
        own = [x.clone().requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad(multiply(product, True, *own), own, upstream))
    assert all(map(torch.equal, *gradients))


def model_and_batch(meshes, precision: Precision, **options):
    model = whole_model(MODEL, meshes, 128, precision=precision, **options)
    enliven(model)
    return model, random_batch(MODEL, 2, 128)


def test_what_is_fp8_in_a_model(meshes):
    """The linears of attention, MLP and experts, and nothing else; loss and gradients move by their rounding."""
    outcomes = []
    for precision in (Precision(torch.float64), FP8):
        model = whole_model(MODEL, meshes, 128, precision=precision)
        products = {name.rsplit(".", 1)[-1] for name, module in model.named_modules()
                    for value in vars(module).values() if isinstance(value, Fp8Gemm)}
        outcome = forward(model, *random_batch(MODEL, 2, 128))
        outcome.loss.backward()
        outcomes.append((products, outcome.loss.item(), gradients_of(model)["lm_head.weight"]))
    (none, exact_loss, exact), (products, loss, head) = outcomes
    assert not none
    assert products == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj",
                        "down_proj", "experts"}
    assert 0 < abs(loss - exact_loss) < 1e-3 * exact_loss
    assert 0.01 < (head - exact).norm() / exact.norm() < 0.2


SELECTIVE = RecomputeSettings("selective", ("layernorm", "mla_up_proj"))


@pytest.mark.parametrize("q_lora_rank", [128, None])
@pytest.mark.parametrize("recomputation", [RecomputeSettings("full"), SELECTIVE], ids=["full", "selective"])
def test_recomputed_bits_are_the_same(meshes, recomputation, q_lora_rank):
    outcomes, config = [], replace(MODEL, q_lora_rank=q_lora_rank)
    for settings in (RecomputeSettings(), recomputation):
        model = whole_model(config, meshes, 128, precision=replace(FP8, master=torch.float32), recompute=settings)
        enliven(model)
        forward(model, *random_batch(config, 1, 128)).loss.backward()
        outcomes.append(gradients_of(model))
    kept, recomputed = outcomes
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_a_model_holds_less(meshes):
    """Bytes alive after the forward: FP8 below bfloat16, recomputed norms with their tiles below that."""
    held = {}
    for name, fp8_on, settings in (("bf16", False, RecomputeSettings()), ("fp8", True, RecomputeSettings()),
                                   ("fp8, norms again", True, RecomputeSettings("selective", ("layernorm",))),
                                   ("bf16, norms again", False, RecomputeSettings("selective", ("layernorm",)))):
        model, batch = model_and_batch(meshes, Precision(torch.float32, torch.bfloat16, fp8_on), recompute=settings)
        with torch.no_grad():
            forward(model, *batch)  # gathers the weights, which stay
        held[name] = kept_by(lambda: forward(model, *batch).loss)[1]
    print(held)
    assert held["fp8, norms again"] < held["fp8"] < held["bf16"]
    assert held["fp8, norms again"] < held["bf16, norms again"]


def test_recomputed_tiles_are_dropped():
    """A producer whose output is block-scaled: its codes and scales are noted, and come again with the same bits."""
    x = torch.randn(128, 256).requires_grad_()
    weight = torch.randn(64, 256).requires_grad_()
    sizes, gradients = [], []
    for product in (Fp8Gemm(), Fp8Gemm(sharing=recomputed)):
        with Watch() as watch:
            with product.shared(x) as shared:
                y = product(shared, weight) + product(shared, weight)
            del shared
        sizes.append(watch.kept_bytes())
        gradients.append(torch.autograd.grad(y.sum(), (x, weight)))
    assert sizes[0] - sizes[1] == 128 * 256 + 128 * 2 * 4
    assert all(map(torch.equal, *gradients))
