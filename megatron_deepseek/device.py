"""The accelerator that a rank computes on: every question about it, and every order to it, in one place.

The rest of the package has tensors, `torch.device`s and this module's functions, and never names torch.cuda
(tests/unit/test_device.py). To support another accelerator, give these functions other bodies: its device type, its
communication library, its streams. Kernels for it are chosen in ops/backends/registry.py. Without an accelerator every
rank computes on the CPU, and only `has_accelerator` and `is_accelerator_in_use` may be asked.

A stream is a queue of work. Whoever has one calls its `wait_stream(other)`, and `record_stream(stream)` of a tensor
that is used on a stream on which it was not made.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice

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


def on_accelerator(x: torch.Tensor) -> bool:
    """Return whether x is on an accelerator, or stands for a tensor that would be."""
    return x.is_cuda or stands_in(x)


def stands_in(x: torch.Tensor) -> bool:
    """Return whether x has no numbers and stands for a tensor on an accelerator (dry_run/fake_tensors.py)."""
    return getattr(getattr(x, "fake_mode", None), "stands_for_accelerator", False)


def compute_capability() -> tuple[int, int]:
    """Return the compute capability of the current device, (9, 0) for Hopper: which instructions kernels may use."""
    return torch.cuda.get_device_capability()


def product_name(device: torch.device) -> str:
    """Return the product's name, from which its peak FLOP/s are known."""
    return torch.cuda.get_device_name(device)


def max_memory(device: torch.device) -> int:
    """Return the most bytes that this process's tensors took on `device` at once."""
    return torch.cuda.max_memory_allocated(device)


def memory_statistics(device: torch.device) -> dict[str, int]:
    """Return the allocator's counts by torch's names, such as `reserved_bytes.all.current`; empty for a CPU."""
    return dict(torch.cuda.memory_stats(device)) if is_accelerator(device) else {}


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


def is_capturing(device: torch.device) -> bool:
    """Return whether what this thread queues on `device` now is captured as a graph, which is replayed later."""
    return is_accelerator(device) and has_accelerator() and torch.cuda.is_current_stream_capturing()


def on_stream(stream: Stream) -> AbstractContextManager:
    """Queue what a `with` block does on `stream`, and on the current device."""
    return torch.cuda.stream(stream)


def on_device(device: torch.device) -> AbstractContextManager:
    """Make `device` this thread's current one in a `with` block."""
    return torch.cuda.device(device)


def start_read(*tensors: torch.Tensor) -> Callable[[], list[list]]:
    """Begin to bring `tensors`, of one dtype, to the host in one copy; return a function that waits for it.

    The function returns one nested list for each tensor. What is queued between the two calls is computed meanwhile.
    """
    together = torch.cat([tensor.reshape(-1) for tensor in tensors])
    finish = _copy_to_pinned(together) if is_accelerator(together.device) else lambda: together

    def read() -> list[list]:
        numbers = iter(finish().tolist())
        return [_nested(numbers, tensor.shape) for tensor in tensors]

    return read


def _nested(numbers: Iterator, shape: torch.Size) -> list:
    """Return the next `numbers` as nested lists of `shape`."""
    if len(shape) > 1:
        return [_nested(numbers, shape[1:]) for _ in range(shape[0])]
    return list(islice(numbers, shape[0]))


def _copy_to_pinned(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queue a copy of x to pinned memory and return a function that waits for this copy alone."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def finish() -> torch.Tensor:
        copied.synchronize()
        return host

    return finish


def send(numbers: list | torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return what the host has, (nested) numbers or a tensor, as a tensor on `device`.

    The host does not wait for the device, as it would in torch.tensor(numbers, device=device).
    """
    tensor = numbers if isinstance(numbers, torch.Tensor) else torch.tensor(numbers, dtype=dtype)
    return tensor.to(device, dtype, non_blocking=True)
