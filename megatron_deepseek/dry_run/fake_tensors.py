"""Tensors without numbers, on which the real code of a training runs."""

import torch
from torch.distributed._tools import fake_collectives  # noqa: F401  results of collectives of fake tensors
from torch.utils._pytree import tree_leaves

from megatron_deepseek.torch_private import FakeTensorMode


class NothingComputed(FakeTensorMode):
    """A mode in which tensors are made without memory, and operators give shapes without numbers.

    Where the host reads a number of such a tensor it gets 1. Operators on ordinary tensors alone, such as the ranks of a
    mesh, are computed as ever.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default and types:
            return 1.0 if args[0].is_floating_point() else 1
        if not types and any(isinstance(each, torch.Tensor) for each in tree_leaves((args, kwargs))):
            return operator(*args, **(kwargs or {}))
        return super().__torch_dispatch__(operator, types, args, kwargs)
