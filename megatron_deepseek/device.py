"""The accelerator that a rank computes on: every question about it, and every order to it, in one place.

The rest of the package has tensors, `torch.device`s and this module's functions, and never names torch.cuda
(tests/unit/test_device.py). To support another accelerator, give these functions other bodies: its device type, its
communication library, its streams. Kernels for it are chosen in ops/backends/registry.py. Without an accelerator every
rank computes on the CPU, and only `has_accelerator` and `is_accelerator_in_use` may be asked.

A stream is a queue of work. Whoever has one calls its `wait_stream(other)`, and `record_stream(stream)` of a tensor
that is used on a stream on which it was not made.
"""

from contextlib import AbstractContextManager

import torch

ACCELERATOR = "cuda"
COLLECTIVES = f"cpu:gloo,{ACCELERATOR}:nccl"  # for tensors on the host and on the accelerator

Stream = torch.cuda.Stream


def has_accelerator() -> bool:
    """Return whether this machine has an accelerator that torch can use."""
    return torch.cuda.is_available()


def is_accelerator_in_use() -> bool:
    """Return whether this process has begun to use an accelerator; to ask does not begin it."""
    return torch.cuda.is_initialized()


def count_accelerators() -> int:
    """Return how many accelerators this node shows to this process."""
    return torch.cuda.device_count()


def accelerator_of_rank(local_rank: int) -> torch.device:
    """Return the accelerator of the rank that is number `local_rank` on its node."""
    return torch.device(ACCELERATOR, local_rank)


def bind_process(device: torch.device) -> None:
    """Make `device` the current one of this process, on which streams are made and kernels are started."""
    torch.cuda.set_device(device)


def is_accelerator(device: torch.device) -> bool:
    """Return whether `device` is an accelerator, and not the CPU or torch's meta device."""
    return device.type == ACCELERATOR


def compute_capability() -> tuple[int, int]:
    """Return the compute capability of the current device, (9, 0) for Hopper: which instructions kernels may use."""
    return torch.cuda.get_device_capability()


def product_name(device: torch.device) -> str:
    """Return the product's name, from which its peak FLOP/s are known."""
    return torch.cuda.get_device_name(device)


def max_memory(device: torch.device) -> int:
    """Return the most bytes that this process's tensors took on `device` at once."""
    return torch.cuda.max_memory_allocated(device)


def synchronize() -> None:
    """Wait until all work that was queued on the current device is done."""
    torch.cuda.synchronize()


def make_stream(device: torch.device) -> Stream:
    """Return a new stream of `device`."""
    return Stream(device)


def current_stream() -> Stream:
    """Return the stream on which this thread queues work now."""
    return torch.cuda.current_stream()


def stream_number(device: torch.device) -> int:
    """Return the number of the stream of `device` on which this thread queues work now; 0 without an accelerator."""
    return torch.cuda.current_stream(device).stream_id if is_accelerator(device) and has_accelerator() else 0


def on_stream(stream: Stream) -> AbstractContextManager:
    """Queue what a `with` block does on `stream`, and on the current device."""
    return torch.cuda.stream(stream)


def on_device(device: torch.device) -> AbstractContextManager:
    """Make `device` this thread's current one in a `with` block."""
    return torch.cuda.device(device)
