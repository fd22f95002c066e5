"""Keep in the host's memory what the backward needs, instead of on the device.

torch.autograd.graph.save_on_cpu handles each saved tensor by itself: it copies weights, too, copies memory that several
tensors share once for each of them, and returns contiguous tensors. Here shared memory is copied once, the caller says
what stays on the device (`stays`), and tensors come back with the strides that they had, so that the backward runs the
same kernels on the same numbers.

Copies use pinned memory and are queued on the stream of the computation: the program does not wait for them, but the
device computes nothing while it copies.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_deepseek.ops.recompute import RecomputeHandle

_INDICES = (torch.bool, torch.int32, torch.int64)  # small, so they stay; uint8 is not here: FP8 codes are bytes


class saved_on_host(torch.autograd.graph.saved_tensors_hooks):
    """Copies tensors saved for the backward to the host, except for indices and those of which `stays` is true."""

    def __init__(self, stays: Callable[[torch.Tensor], bool]):
        # The weak references keep addresses of freed storages from being used again while they are keys here.
        copied: dict[tuple, tuple[StorageWeakRef, RecomputeHandle]] = {}

        def pack(tensor: torch.Tensor):
            if tensor.dtype in _INDICES or stays(tensor):
                return tensor
            storage = StorageWeakRef(tensor.untyped_storage())
            key = storage.cdata, tensor._version, tensor.dtype
            if key not in copied:
                copied[key] = storage, to_host(tensor)
            handle = copied[key][1]
            return handle, handle.note(0, tensor)

        super().__init__(pack, _read)


def _read(packed) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    handle, note = packed
    return handle.read(note)


def to_host(tensor: torch.Tensor) -> RecomputeHandle:
    """Start copying the whole storage of `tensor` to the host; return the handle that brings it back."""
    storage = tensor.untyped_storage()
    whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
    host = torch.empty_like(whole, device="cpu", pin_memory=tensor.is_cuda)
    host.copy_(whole, non_blocking=True)
    return RecomputeHandle(partial(_to_device, host, tensor.device))


def _to_device(host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor]:
    """Return a copy on the device, also where that is the host: a dry run counts it as a GPU's."""
    return (host.to(device, non_blocking=True, copy=True),)
