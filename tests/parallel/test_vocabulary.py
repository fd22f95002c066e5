"""Cross-entropy over a vocabulary that two ranks share, where only the joint maximum keeps exponentials finite."""

import pytest
import torch
import torch.nn.functional as F

from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary import vocab_parallel_cross_entropy

# Of four tokens the largest logit is on either rank, or on both; one label has next to nothing.
LOGITS_TV = torch.tensor([[1e4, 1e4 - 1, -1e4, -1e4], [-1e4, -1e4, 1e4, 1e4 - 2], [3.0, 2.0, 3.0, 1.0],
                          [1e4, 0.0, 0.0, -1e4]])
LABELS_T = torch.tensor([1, 3, 0, 2])


def own_loss() -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, and the gradient of this rank's logits."""
    tp = TensorParallel(build_meshes(Layout(tp=2), torch.device("cpu")).tp, sequence_parallel=False)
    logits_Tv = LOGITS_TV.chunk(2, 1)[tp.rank].clone().requires_grad_()
    loss_T = vocab_parallel_cross_entropy(logits_Tv, LABELS_T, tp)
    loss_T.sum().backward()
    return loss_T.detach(), logits_Tv.grad


def test_logits_far_apart_on_two_ranks(ranks):
    logits_TV = LOGITS_TV.clone().requires_grad_()
    expected_T = F.cross_entropy(logits_TV, LABELS_T, reduction="none")
    expected_T.sum().backward()
    (loss_T, gradient), (same_T, other) = ranks.run(2, own_loss)
    torch.testing.assert_close(loss_T, expected_T.detach())
    assert torch.equal(loss_T, same_T) and loss_T[3] == pytest.approx(1e4)
    torch.testing.assert_close(torch.cat([gradient, other], 1), logits_TV.grad)
