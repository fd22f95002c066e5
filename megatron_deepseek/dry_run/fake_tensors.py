"""Tensors without numbers, on which the real code of a training runs."""

import torch
from torch.distributed._tools import fake_collectives  # noqa: F401  results of collectives of fake tensors
from torch.utils._pytree import tree_leaves

from torch.distributed import Work

from megatron_deepseek.torch_private import FakeTensorMode

_OF_NUMBERS = torch.ops.aten.lift_fresh.default  # torch.tensor([1, 2]): on a device it takes memory as any other


class _Keeps(Work):
    """The work of a collective that is done at once. As a back end's it keeps its tensors as long as somebody has it."""

    def __init__(self, running: set["_Keeps"], tensors):
        super().__init__()
        self._running, self._tensors = running, tensors

    def wait(self, timeout=None) -> bool:
        self._running.discard(self)
        return True


class NothingComputed(FakeTensorMode):
    """A mode in which tensors are made without memory, and operators give shapes without numbers.

    Where the host reads a number of such a tensor it gets 1. Operators on ordinary tensors alone, such as the ranks of a
    mesh, are computed as ever.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self._works: set[_Keeps] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default and types:
            return 1.0 if args[0].is_floating_point() else 1
        if operator is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as in a job; torch's function for fake tensors makes a new one
        if not types and operator is not _OF_NUMBERS and _on_host(tree_leaves((args, kwargs))):
            return operator(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(operator, types, args, kwargs)
        return self._keeping(result, args) if operator.namespace == "c10d" else result

    def _keeping(self, result, args):
        """Return a collective's result with a Work that keeps what it works on until somebody has waited."""
        work = _Keeps(self._works, args)
        self._works.add(work)
        return (*result[:-1], work.boxed()) if isinstance(result, tuple) else work.boxed()


def _on_host(arguments: list) -> bool:
    """Return whether an operator's arguments have tensors, and they have numbers."""
    tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
    return bool(tensors) and not any(each.is_meta for each in tensors)
