"""Experts' weights that are kept as NF4 or FP8, made plain in a dry run: one stands for all of a rank.

On a GPU they are made plain one after another, each with the same tensors in between, which are freed before the next
(ops/frozen_weight.py). With 32 on a rank most operators of a step would be these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

import torch

from megatron_deepseek.ops.frozen_weight import FrozenWeight


@contextmanager
def one_expert_for_all() -> Iterator[None]:
    """Make one expert of each stack plain for a `with` block, into the memory of all."""
    whole = FrozenWeight.dense
    FrozenWeight.dense = partialmethod(_dense, whole)
    try:
        yield
    finally:
        FrozenWeight.dense = whole


def _dense(weight: FrozenWeight, whole, dtype: torch.dtype) -> torch.Tensor:
    """Return what `whole` does: the numbers of a matrix [N, K], or of experts [E, N, K]."""
    if weight.codes.ndim == 2:
        return whole(weight, dtype)
    out = torch.empty(*weight.codes.shape[:2], weight.form.columns, dtype=dtype, device=weight.codes.device)
    out[0].copy_(weight.form.dense(weight.codes[0], weight.scales[0], dtype))
    return out
