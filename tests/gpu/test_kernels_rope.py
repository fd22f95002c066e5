"""Fused RoPE against apply_rope and torch's split and concatenation: the same numbers, bit for bit."""

import pytest
import torch

from megatron_deepseek.ops.backends.kernels import operator
from megatron_deepseek.ops.rope import apply_rope

SHAPES = [(1, 3, 5, 16, 8, 24), (2, 4, 16, 128, 64, 128), (1, 1, 1, 8, 128, 8), (2, 0, 3, 16, 8, 8)]


def table(positions: int, rope: int, device) -> torch.Tensor:
    angles = torch.rand(positions, rope // 2, device=device) * 6
    return torch.stack([angles.cos(), angles.sin()])


def normal(*shape: int, device) -> torch.Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def joined(x, table_2SD, nope):
    return torch.cat([x[..., :nope], apply_rope(x[..., nope:], table_2SD)], -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_tail(device, shape):
    batch, positions, heads, nope, rope, _ = shape
    x, turns = normal(batch, positions, heads, nope + rope, device=device), table(positions, rope, device)
    assert torch.equal(operator("rope_tail")(x, turns, nope, False), joined(x, turns, nope))


@pytest.mark.parametrize("shape", SHAPES)
def test_tail_backward(device, shape):
    batch, positions, heads, nope, rope, _ = shape
    turns = table(positions, rope, device)
    x = normal(batch, positions, heads, nope + rope, device=device).requires_grad_()
    grad = normal(batch, heads, positions, nope + rope, device=device).transpose(1, 2)
    (got,) = torch.autograd.grad(operator("rope_tail")(x, turns, nope, False), x, grad)
    (expected,) = torch.autograd.grad(joined(x, turns, nope), x, grad)
    assert torch.equal(got, expected)


def reference(kv, k_rope, turns, nope):
    heads = kv.shape[2]
    turned = k_rope.unsqueeze(2) if turns is None else apply_rope(k_rope.unsqueeze(2), turns)
    return torch.cat([kv[..., :nope], turned.expand(-1, -1, heads, -1)], -1), kv[..., nope:]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_values(device, shape, turned):
    batch, positions, heads, nope, rope, value = shape
    kv = normal(batch, positions, heads, nope + value, device=device)
    k_rope = normal(batch, positions, rope, device=device)
    turns = None if turned else table(positions, rope, device)
    for got, expected in zip(operator("keys_values")(kv, k_rope, turns, nope), reference(kv, k_rope, turns, nope)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_values_backward(device, shape, turned, any_order):
    """The sum over heads is float32 here, which torch's expand rounds to bfloat16 once too: half of 2^-8, or less
    where the sum cancels, hence the absolute tolerance.
    """
    batch, positions, heads, nope, rope, value = shape
    kv = normal(batch, positions, heads, nope + value, device=device).requires_grad_()
    k_rope = normal(batch, positions, rope, device=device).requires_grad_()
    turns = None if turned else table(positions, rope, device)
    k, v = operator("keys_values")(kv, k_rope, turns, nope)
    grads = (normal(batch, heads, positions, nope + rope, device=device).transpose(1, 2),
             normal(batch, heads, positions, value, device=device).transpose(1, 2))
    got = torch.autograd.grad((k, v), (kv, k_rope), grads)
    wide = [x.detach().double().requires_grad_() for x in (kv, k_rope)]
    expected = torch.autograd.grad(reference(*wide, turns, nope), wide, [g.double() for g in grads])
    assert torch.equal(got[0], expected[0].bfloat16())
    torch.testing.assert_close(got[1].double(), expected[1], rtol=2**-8, atol=1e-5)
