"""The one function by which the engine reads a linear layer's weight instead of multiplying by it."""

import torch

from megatron_deepseek.parallel.tensor import ParallelLinear


def dense_weight(linear: ParallelLinear, dtype: torch.dtype) -> torch.Tensor:
    """Return this rank's weight [out, in] as plain numbers of `dtype`."""
    return linear.local_weight().to(dtype)
