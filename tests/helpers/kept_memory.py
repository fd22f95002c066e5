"""What a function keeps alive, in bytes: for tests of recomputation, offloading and FP8's shared inputs."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Weak references to the storages of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and not tensor.is_mkldnn:  # which have no storage to refer to
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = reference, storage.nbytes()
        return result

    def kept_bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept_by(function) -> tuple[torch.Tensor, int]:
    """The result of `function`, and the bytes that it keeps alive."""
    with Watch() as watch:
        result = function()
    return result, watch.kept_bytes()
