"""Fused cross-entropy against float64 and the forms of parallel/vocabulary.py."""

import pytest
import torch

from megatron_deepseek.ops.backends.kernels import operator


def batch(rows: int, columns: int, device, scale: float = 4.0):
    logits = (scale * torch.randn(rows, columns, device=device)).bfloat16()
    return logits, torch.randint(columns, (rows,), device=device)


@pytest.mark.parametrize("rows, columns", [(1, 8), (3, 11), (2, 4096), (2, 8200), (5, 5003), (2, 1), (0, 16)])
def test_statistics(device, rows, columns, any_order):
    """Sums of up to 8,200 float32 numbers: 1e-5. The threads of a block go through rows of 8,200 and of 5,003 again."""
    logits, labels = batch(rows, columns, device)
    got_max, got_sum, got_label = operator("cross_entropy_statistics")(logits, labels, 0)
    wide = logits.double()
    assert torch.equal(got_max, wide.amax(-1).float())
    torch.testing.assert_close(got_sum.double(), (wide - wide.amax(-1, keepdim=True)).exp().sum(-1), rtol=1e-5, atol=0)
    assert torch.equal(got_label, logits.gather(1, labels.unsqueeze(1)).squeeze(1).float())


@pytest.mark.parametrize("rows, columns, first_id", [(1, 8, 0), (3, 11, 0), (2, 4096, 0), (2, 8200, 0),
                                                     (2, 5003, 0), (4, 24, 0), (4, 24, 48)])
def test_gradient_in_place(device, rows, columns, first_id):
    """float32 arithmetic, then one rounding to bfloat16: half of 2^-8."""
    logits, labels = batch(rows, columns, device)
    grad, before = torch.rand(rows, device=device) + 0.5, logits.double()
    top, total, _ = operator("cross_entropy_statistics")(logits, labels + first_id, first_id)
    operator("cross_entropy_gradient_")(logits, labels + first_id, first_id, top, total, grad)
    one_hot = torch.nn.functional.one_hot(labels, columns)
    torch.testing.assert_close(logits.double(), (before.softmax(-1) - one_hot) * grad.double().unsqueeze(1),
                               rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("first_id", [0, 24, -24])
def test_labels_of_other_ranks_count_nothing(device, first_id):
    """Ids first_id .. first_id + 23 are this rank's; each label is in the middle of another rank's part, or of none, or
    next to this rank's part, where the rows beside the label's have their logits.
    """
    logits, _ = batch(4, 24, device)
    labels = torch.tensor([-100, first_id - 1, first_id + 24, 60], device=device)
    top, total, label = operator("cross_entropy_statistics")(logits, labels, first_id)
    assert label.tolist() == [0.0] * 4
    expected = logits.float().softmax(-1)
    operator("cross_entropy_gradient_")(logits, labels, first_id, top, total, torch.ones(4, device=device))
    torch.testing.assert_close(logits.float(), expected, rtol=2**-8, atol=1e-6)


def test_extremes(device):
    """Ruled-out ids, a certain label, a row of -inf, numbers whose exponentials overflow."""
    inf = float("inf")
    logits = torch.tensor([[-inf, 0, -inf, 0], [1e30, -1e30, 0, 0], [-inf] * 4, [3e4, 3e4, 3e4, 3e4]], device=device)
    top, total, _ = operator("cross_entropy_statistics")(
        logits.bfloat16(), torch.zeros(4, dtype=torch.int64, device=device), 0)
    assert total.tolist() == [2.0, 1.0, 0.0, 4.0]
    assert top[2] == -inf


def test_nan_is_not_hidden(device):
    logits, labels = batch(1, 64, device)
    logits[0, 50] = float("nan")
    _, total, _ = operator("cross_entropy_statistics")(logits, labels, 0)
    assert total.isnan().all()
