"""Vocabulary-parallel cross-entropy on one rank against torch's own, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary import vocab_parallel_cross_entropy


@pytest.fixture
def tp(meshes) -> TensorParallel:
    return TensorParallel(meshes.tp, sequence_parallel=False)


def batch(dtype=torch.float64, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(6, 11, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(11, (6,), generator=generator)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_loss_and_gradient(tp, scale):
    """float64 rounding alone, as a share of losses and gradients of the order of one."""
    logits, labels = batch(scale=scale)
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    got, expected = vocab_parallel_cross_entropy(logits, labels, tp), F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad((got * weights).sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), logits)[0],
                               rtol=1e-12, atol=1e-13)


def test_gradcheck(tp):
    logits, labels = batch()
    assert gradcheck(lambda logits: vocab_parallel_cross_entropy(logits, labels, tp), (logits,))


@pytest.mark.parametrize("shift", [-1e30, -1e4, 1e4, 1e30])
def test_extreme_logits(tp, shift):
    """No overflow, whatever all the logits are shifted by; and ruled-out ids at -inf take no part."""
    logits = torch.full((1, 4), shift)
    logits[0, 3] = float("-inf")
    logits.requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([1]), tp)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([3.0]).log())
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3, -2 / 3, 1 / 3, 0.0]]))


def test_certain_and_impossible(tp):
    """Loss 0 where the label has everything, 2e4 where it has nothing; gradients stay in [-1, 1]."""
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([0, 1]), tp)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2e4]
    assert logits.grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]


def test_bfloat16_logits_give_a_float32_loss(tp):
    """The loss is that of the rounded logits in float32; only the gradient is rounded to bfloat16 (half of 2^-7)."""
    logits, labels = batch(torch.bfloat16, scale=4.0)
    loss = vocab_parallel_cross_entropy(logits, labels, tp)
    wide = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (gradient,), (exact,) = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(expected.sum(), wide)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), exact, rtol=2**-8, atol=1e-7)


def test_logits_are_left_as_they_were(tp):
    logits, labels = batch()
    before = logits.detach().clone()
    vocab_parallel_cross_entropy(logits, labels, tp).sum().backward()
    assert torch.equal(logits, before)
