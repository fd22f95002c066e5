"""Products in float32 of bfloat16 operands, as processors without oneDNN's bfloat16 have them, against float64.

A result is rounded to bfloat16 once, after a sum in float32: ROUNDED is half of its last bit and that sum's rounding.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from small_engines import V3_MTP, WINDOWED, engine, loaded
from small_trainers import BF16, batch_of, trainer

from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.base_weights import BaseSettings
from megatron_deepseek.ops import products
from megatron_deepseek.ops.attention import Scores, attend, attend_backward, fused_attention
from megatron_deepseek.ops.products import by_weight, linear, multiply, multiply_each
from megatron_deepseek.parallel.zero_bubble import defer_weight_gradients
from megatron_deepseek.settings import LossSettings
from megatron_deepseek.torch_private import TorchDispatchMode

ROUNDED = {"rtol": 2**-8, "atol": 1e-5}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "linear", "matmul", "scaled_dot_product_attention"}  # as they are called without gradients


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch):
    """A processor whose products of bfloat16 are a plain loop."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)


def narrow(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16().requires_grad_()


def assert_rounded_once(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, **ROUNDED)


@pytest.mark.parametrize("numbers", [1, 100, 1 << 24])
def test_a_product_is_rounded_once_however_many_columns_are_widened_at_a_time(monkeypatch, numbers):
    monkeypatch.setattr(products, "WIDENED_NUMBERS", numbers)
    a, b, out = narrow(5, 300), narrow(300, 7), torch.full((5, 7), torch.nan).bfloat16()
    with torch.no_grad():
        expected = a.double() @ b.double()
        assert_rounded_once(multiply(a, b), expected)
        assert multiply(a, b, out=out) is out
        assert_rounded_once(out, expected)
        assert_rounded_once(multiply_each(a[None], b[None]), expected[None])


def test_a_linear_and_its_gradients():
    x, weight, upstream = narrow(2, 3, 40), narrow(6, 40), narrow(2, 3, 6)
    wide_x, wide_weight = (each.detach().double().requires_grad_() for each in (x, weight))
    expected = F.linear(wide_x, wide_weight)
    got = linear(x, weight)
    assert_rounded_once(got, expected)
    got.backward(upstream)
    expected.backward(upstream.double())
    assert_rounded_once(x.grad, wide_x.grad)
    assert_rounded_once(weight.grad, wide_weight.grad)
    assert_rounded_once(by_weight(upstream.detach(), weight.detach()), wide_x.grad)


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_a_linear_keeps_what_the_gradients_that_are_wanted_need(trained):
    x, weight = narrow(3, 4).requires_grad_(trained == "x"), narrow(5, 4).requires_grad_(trained == "weight")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda x: x):
        linear(x, weight)
    assert saved == [weight.shape if trained == "x" else x.shape]


@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16])
def test_attention_is_that_of_float32(mask):
    q, k, v = narrow(1, 2, 5, 8), narrow(1, 2, 5, 8), narrow(1, 2, 5, 8)
    seen = torch.ones(5, 5).tril().bool()
    masks = {None: None, torch.bool: seen, torch.bfloat16: torch.zeros(5, 5).masked_fill(~seen, -torch.inf).bfloat16()}
    got = fused_attention(q, k, v, attn_mask=masks[mask], scale=0.3)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3,
                                              attn_mask=None if mask is None else seen)
    assert_rounded_once(got, expected)


def test_a_part_of_attention_and_its_gradients_are_those_of_float32():
    q, k, v, grad = (narrow(1, 2, 5, 8).detach() for _ in range(4))
    scores = Scores(0.3, causal=True)
    wide = [each.float() for each in (q, k, v)]
    out, lse = attend(q, k, v, scores)
    expected, expected_lse = attend(*wide, scores)
    assert torch.equal(out, expected.bfloat16()) and torch.equal(lse, expected_lse)
    for got, expected in zip(attend_backward(grad, q, k, v, out, lse, scores),
                             attend_backward(grad.float(), *wide, out.float(), lse, scores), strict=True):
        assert torch.equal(got, expected.bfloat16())


class _Narrow(TorchDispatchMode):
    """Names of the products that were computed from bfloat16."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name in PRODUCTS:
            self.seen += [name] * any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args)
        return function(*args, **(kwargs or {}))


@contextmanager
def no_narrow_product():
    with _Narrow() as mode:
        yield
    assert not mode.seen


STEPS = {"whole": {}, "head by chunks": {"loss": LossSettings(loss_chunk_size=3)},
         "adapters": {"lora": LoraSettings(2, 4.0)},
         "adapters beside NF4": {"lora": LoraSettings(2, 4.0), "base": BaseSettings(4)}}


@pytest.mark.parametrize("name", STEPS)
def test_no_product_of_a_step_is_computed_from_bfloat16(meshes, name):
    made = trainer(meshes, precision=BF16, lively=name in ("whole", "head by chunks"), **STEPS[name])
    with no_narrow_product():
        made.train_step(batch_of(4), 1e-3)


def test_no_product_of_a_step_that_leaves_weight_gradients_for_later_is_computed_from_bfloat16(meshes):
    made = trainer(meshes, precision=BF16)
    deferred = defer_weight_gradients(made.stages[0])
    with no_narrow_product():
        made.train_step(batch_of(4), 1e-3)
        deferred.take()()


@pytest.mark.parametrize("config", [V3_MTP, WINDOWED], ids=["mla", "gqa"])
def test_no_product_of_an_answer_is_computed_from_bfloat16(meshes, config):
    made = engine(loaded(config, meshes, torch.bfloat16))
    prompts = [list(range(3, 30)), [5, 6, 7]]
    with no_narrow_product():
        made.generate(prompts, SamplingParameters(temperature=0, max_tokens=4))


def test_a_narrow_product_would_be_seen(meshes, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    made = trainer(meshes, precision=BF16)
    with pytest.raises(AssertionError), no_narrow_product():
        made.train_step(batch_of(4), 1e-3)
