"""Bytes that FP8's operators take on a GPU for a moment, by hand: what is not copied where nothing is padded."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_deepseek.dry_run.fake_tensors import nothing_computed
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.ops.fp8.attention import attention
from megatron_deepseek.ops.fp8.encoding import dequantize_1x128

S, N = 256, 4
SHORT_OF_A_HEAD = 16 * 1024  # scales, log-sum-exps, random states: far less than any tensor of S x N x 128


@contextmanager
def on_gpu() -> Iterator[StorageLog]:
    with nothing_computed(True), StorageLog().watching() as log:
        yield log


def most(log: StorageLog, first: int) -> int:
    """Return the most bytes beyond those that were there before event number `first`."""
    sizes: dict[int, int] = {}
    now = highest = 0
    for number, (allocation, size) in enumerate(zip(*log.events)):
        if number == first:
            now = highest = 0
        now += size - sizes.get(allocation, 0)
        sizes[allocation] = size
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("width", [128, 192])
def test_backward_of_attention(width):
    """The output of its E5M6, then gradients of queries, keys and values as wide as keys; where these are wider than
    values the kernel also reads copies of the output, its gradient and the values that are padded.
    """
    with on_gpu() as log:
        q, k = (torch.empty(1, S, N, width, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        v = torch.empty(1, S, N, 128, dtype=torch.bfloat16).requires_grad_()
        y = attention(q, k, v, None, 1.0, 128)
        gradient = torch.empty(1, S, N * 128, dtype=torch.bfloat16)
        first = len(log.events[0])
        torch.autograd.grad(y, (q, k, v), gradient)
        number = of_a_head(128) + 3 * of_a_head(width) + (3 * of_a_head(width) if width > 128 else 0)
        assert number <= most(log, first) < number + SHORT_OF_A_HEAD


def of_a_head(width: int) -> int:
    return 2 * S * N * width


def test_rows_of_tiles():
    """No float32 rows are made on the way."""
    with on_gpu() as log:
        q, scale = torch.empty(S, 256, dtype=torch.float8_e4m3fn), torch.empty(S, 2)
        first = len(log.events[0])
        dequantize_1x128(q, scale, torch.bfloat16)
        assert most(log, first) == 2 * S * 256
