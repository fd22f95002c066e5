"""The output head against torch's own softmax over whole logits, in float64."""

import pytest
import torch
import torch.nn.functional as F

from megatron_deepseek.model.head import OutputHead
from megatron_deepseek.parallel.tensor import TensorParallel

B, S, H, V, K = 2, 5, 6, 11, 3


@pytest.fixture
def tp(meshes) -> TensorParallel:
    return TensorParallel(meshes.tp, sequence_parallel=False)


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    """State [B, S, H] and the head's weight [V, H]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
                 for shape in ((B, S, H), (V, H)))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def assert_same(got: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Values, and gradients by `inputs` of a sum with unequal weights: float64 rounding alone."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.5, 2, got.numel(), dtype=got.dtype).view_as(got)
    gradients, wanted = (torch.autograd.grad((each * weights).sum(), inputs) for each in (got, expected))
    for one, other in zip(gradients, wanted):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def forward_kl(logits, teacher_ids, teacher_log_p):
    """Of the teacher's largest K probabilities, [T]."""
    return (teacher_log_p.exp() * (teacher_log_p - logits.log_probabilities(teacher_ids))).sum(-1)


def test_log_probabilities(tp, states):
    state, weight = states
    head, labels = OutputHead(tp, lambda: weight), ids(B, S)
    expected = F.linear(state, weight).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert_same(head.log_probabilities(state, labels), expected, states)


def test_entropy(tp, states):
    state, weight = states
    log_p = F.linear(state, weight).log_softmax(-1)
    assert_same(OutputHead(tp, lambda: weight).entropy(state), -(log_p.exp() * log_p).sum(-1), states)


def test_distillation(tp, states):
    state, weight = states
    teacher_ids, teacher_log_p = ids(B, S, K), -1 - torch.rand(B, S, K, dtype=torch.float64)
    log_p = F.linear(state, weight).log_softmax(-1).gather(-1, teacher_ids)
    got = OutputHead(tp, lambda: weight).for_chunks(state, forward_kl, teacher_ids, teacher_log_p)
    assert_same(got, (teacher_log_p.exp() * (teacher_log_p - log_p)).sum(-1), states)
