"""What waits between a backward of the inputs and W: no graph, and so nothing of what the stage received."""

import weakref

import pytest
import torch

from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.vocabulary_chunks import log_probabilities
from megatron_deepseek.parallel.zero_bubble import DeferredGradients

T, H, N = 6, 4, 5
PRODUCTS = {
    "linear": lambda x, weight, deferred, tp: deferred.linear(x, weight),
    "grouped": lambda x, weight, deferred, tp: deferred.grouped_gemm(x, weight[None], [T]),
    "head": lambda x, weight, deferred, tp: log_probabilities(
        x, weight, torch.arange(T) % N, 2, tp, deferred.defer),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_the_input_of_a_waiting_product_holds_no_graph(product, meshes):
    deferred, weight = DeferredGradients(), torch.randn(N, H, requires_grad=True)
    received = torch.randn(T, H, requires_grad=True)
    gone = weakref.ref(received)
    result = product(received * 2, weight, deferred, TensorParallel(meshes.tp, sequence_parallel=False))
    result.sum().backward()
    make = deferred.take()
    del received, result
    assert gone() is None
    make()
    assert weight.grad.abs().sum() > 0
