"""The counter of reads against calls that are known to read, or not to."""

import pickle

import numpy as np
import pytest
import torch
from host_reads import host_reads

from megatron_deepseek.device import send, start_read
from megatron_deepseek.ops.fp8.block_scaled import BlockScaled
from megatron_deepseek.ops.permute import count_choices

X = torch.tensor([3.0, 0.0, 2.0])
CHOSEN = torch.tensor([2, 0, 2])
Y = X.clone().requires_grad_()


class Reads(BlockScaled):
    """Tiles whose operators read."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0].scale * args[0].scale.sum().item()


READ = {
    "item": lambda: X[0].item(), "float": lambda: float(X[0]), "bool": lambda: bool(X.any()),
    "tolist": lambda: X.tolist(), "nonzero": lambda: X.nonzero(), "mask": lambda: X[X > 0],
    "masked write": lambda: X.clone().__setitem__(X > 9, 1.0),
    "bincount": lambda: CHOSEN.bincount(minlength=3), "unique": lambda: CHOSEN.unique(),
    "repeat": lambda: CHOSEN.repeat_interleave(CHOSEN), "cpu": lambda: X.cpu(),
    "copy": lambda: X.to(torch.device("cpu")), "made there": lambda: torch.tensor([1.0], device="cpu"),
    "array": lambda: np.asarray(X), "printed": lambda: repr(X), "pickled": lambda: pickle.dumps(X),
    "type": lambda: X.type("torch.FloatTensor"), "made of tensors": lambda: torch.tensor([[1.0, X[0]]]),
    "made beside": lambda: X.new_tensor([1.0]), "taken there": lambda: torch.asarray([1.0], device="cpu"),
    "index of numbers": lambda: X[[0, 2]], "index of an array": lambda: X.view(1, 3)[:, np.array([2, 0])],
    "write by numbers": lambda: X.clone().__setitem__([0, 2], 1.0), "equal": lambda: torch.equal(X, X),
    "allclose": lambda: X.allclose(X), "isin": lambda: torch.isin(CHOSEN, CHOSEN), "range": lambda: X.histc(3),
    "inverse": lambda: torch.linalg.inv(torch.eye(2)), "size": lambda: torch.zeros(CHOSEN[0]),
    "part of a tensor of its own": lambda: -Reads(X, X, torch.float32)}
NOT_READ = {
    "index": lambda: X[CHOSEN], "where": lambda: X.where(X > 0, 1.0), "dtype": lambda: X.to(torch.float64),
    "repeat to a size": lambda: CHOSEN.repeat_interleave(CHOSEN, output_size=4),
    "twice": lambda: X.repeat_interleave(2),
    "like another": lambda: X.to(CHOSEN), "slice": lambda: X[:2, None], "number": lambda: X[1],
    "made on the host": lambda: torch.tensor([[1.0]]), "filled": lambda: torch.full((2,), 3.0, device="cpu"),
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


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.to("cpu"), repr],
                         ids=["item", "tolist", "copy", "printed"])
@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward,
                                      lambda y: torch.autograd.grad(y, Y)], ids=["of a tensor", "of several", "grad"])
def test_reads_of_a_backward_are_counted(read, backward):
    class ReadsBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            read(grad)
            return grad

    y = ReadsBackward.apply(Y).sum()
    with host_reads() as reads:
        backward(y)
    assert len(reads) == 1


def test_functions_are_as_before_afterwards():
    before = {name: vars(torch.Tensor).get(name) for name in ("tolist", "to", "__getitem__", "__repr__")}
    with host_reads():
        pass
    assert {name: vars(torch.Tensor).get(name) for name in before} == before


def test_choices_are_counted_by_number():
    assert count_choices(torch.tensor([[2, 0], [2, 4]]), 5).tolist() == [1, 0, 2, 0, 1]
    assert count_choices(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
