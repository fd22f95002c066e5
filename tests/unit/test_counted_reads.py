"""The counter of reads against calls that are known to read, or not to."""

import pytest
import torch
from host_reads import host_reads

from megatron_deepseek.device import send, start_read
from megatron_deepseek.ops.permute import count_choices

X = torch.tensor([3.0, 0.0, 2.0])
CHOSEN = torch.tensor([2, 0, 2])

READ = {
    "item": lambda: X[0].item(), "float": lambda: float(X[0]), "bool": lambda: bool(X.any()),
    "tolist": lambda: X.tolist(), "nonzero": lambda: X.nonzero(), "mask": lambda: X[X > 0],
    "masked write": lambda: X.clone().__setitem__(X > 9, 1.0),
    "bincount": lambda: CHOSEN.bincount(minlength=3), "unique": lambda: CHOSEN.unique(),
    "repeat": lambda: CHOSEN.repeat_interleave(CHOSEN), "cpu": lambda: X.cpu(),
    "copy": lambda: X.to(torch.device("cpu")), "made there": lambda: torch.tensor([1.0], device="cpu")}
NOT_READ = {
    "index": lambda: X[CHOSEN], "where": lambda: X.where(X > 0, 1.0), "dtype": lambda: X.to(torch.float64),
    "repeat to a size": lambda: CHOSEN.repeat_interleave(CHOSEN, output_size=4),
    "twice": lambda: X.repeat_interleave(2),
    "sent": lambda: send([1, 2], torch.device("cpu")), "sent tensor": lambda: send(X, torch.device("cpu")),
    "counted": lambda: count_choices(CHOSEN, 3)}


@pytest.mark.parametrize("name", READ)
def test_a_read_is_counted_once(name):
    with host_reads() as reads:
        READ[name]()
    assert len(reads) == 1, reads


@pytest.mark.parametrize("name", NOT_READ)
def test_what_stays_on_the_device_is_not_counted(name):
    with host_reads() as reads:
        NOT_READ[name]()
    assert not reads


def test_numbers_that_are_read_together_are_one_read():
    tensors = torch.tensor([4, 5]), torch.arange(6).view(2, 3), torch.empty(0, 2, dtype=torch.int64)
    with host_reads() as reads:
        read = start_read(*tensors)
        assert not reads
        assert read() == [[4, 5], [[0, 1, 2], [3, 4, 5]], []]
    assert len(reads) == 1


def test_reads_of_a_backward_are_counted():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    y = Reads.apply(X.clone().requires_grad_()).sum()
    with host_reads() as reads:
        y.backward()
    assert len(reads) == 1


def test_choices_are_counted_by_number():
    assert count_choices(torch.tensor([[2, 0], [2, 4]]), 5).tolist() == [1, 0, 2, 0, 1]
    assert count_choices(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
