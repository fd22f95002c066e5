"""Counts the places where the host reads what a device computed, and on an accelerator would wait for it.

On the CPU nothing waits, so that such a read costs nothing and is not noticed. What reads is known, though: `item`,
`tolist`, `bool` and their like, operators whose result or its size depends on the data (`equal`, `nonzero`, a boolean
index, `unique`), and those that look at their input to check it. Copies to a device count too where the host waits for
them. A read through device.start_read is one read, however many numbers it brings. Tensors that stay on the host
everywhere are not to be told from the others, so that their reads count as well. Copies between two tensors do not
count, `copy_` and `to(tensor)`: of which devices they are is not to be told either.
"""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Of torch.Tensor, which never become an operator on the CPU: they read memory as it is.
METHODS = ("tolist", "numpy", "cpu", "type", "__array__", "__repr__", "__reduce_ex__")
# Torch's own tags tell of others. These look at their input without a tag.
UNTAGGED = {"isin", "histc", "_linalg_check_errors"}
TAGS = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def _package_line() -> str:
    """Return the innermost line of the package, or of its caller, that led here."""
    frames = [frame for frame in traceback.extract_stack() if "host_reads" not in frame.filename]
    own = [frame for frame in frames if "megatron_deepseek" in frame.filename.rpartition("site-packages")[2]]
    frame = (own or frames)[-1]
    return f"{frame.filename.rpartition('megatron_deepseek/')[2]}: {frame.name}: {frame.line}"


def _always(*args, **kwargs) -> bool:
    return True


def _makes_of_numbers(numbers, *args, **kwargs) -> bool:
    """Whether torch.tensor and its like read tensors, or copy to a device."""
    return kwargs.get("device") is not None or isinstance(numbers, list | tuple) and _any_tensor(numbers)


def _any_tensor(numbers: list | tuple) -> bool:
    return any(isinstance(each, torch.Tensor) or isinstance(each, list | tuple) and _any_tensor(each)
               for each in numbers)


def _copies_and_waits(x: torch.Tensor, *args, **kwargs) -> bool:
    """Whether `to` brings x to another device so that the host waits: not with `non_blocking`."""
    return not kwargs.get("non_blocking") and any(
        isinstance(each, torch.device | str) for each in (*args, *kwargs.values()))


def _is_indexed_by_numbers(x: torch.Tensor, index, *value) -> bool:
    """Whether x[index] copies numbers of the host to where x is."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(each, list | range | np.ndarray) for each in parts)


def _functions() -> Iterator[tuple[object, str, Callable[..., bool]]]:
    """Yield functions by owner and name, and which of their calls read or wait."""
    for name in METHODS:
        yield torch.Tensor, name, _always
    yield torch.Tensor, "new_tensor", _always
    yield torch.Tensor, "to", _copies_and_waits
    for name in ("__getitem__", "__setitem__"):
        yield torch.Tensor, name, _is_indexed_by_numbers
    for name in ("tensor", "as_tensor", "asarray"):
        yield torch, name, _makes_of_numbers


class _Reads:
    """The lines that read so far. What a function calls that reads is part of the same read."""

    def __init__(self):
        self.lines: list[str] = []
        self._inside = threading.local()

    def watched(self, function: Callable, reads: Callable[..., bool]) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            if getattr(self._inside, "a_read", False) or not reads(*args, **kwargs):
                return function(*args, **kwargs)
            self.add()
            self._inside.a_read = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.a_read = False

        return call

    def add(self) -> None:
        if not getattr(self._inside, "a_read", False):
            self.lines.append(_package_line())


class _Operators(TorchDispatchMode):
    def __init__(self, reads: _Reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(not each.__module__.startswith("torch") for each in types):
            return NotImplemented  # of this project's own tensors: the operators that this one is made of come here
        kwargs = kwargs or {}
        if _reads(operator, args, kwargs):
            self.reads.add()
        return operator(*args, **kwargs)


def _reads(operator, args: tuple, kwargs: dict) -> bool:
    name = operator.overloadpacket.__name__
    if name in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and isinstance(args[0], torch.Tensor) and not isinstance(args[-1], int)
    return name in UNTAGGED or any(tag in operator.tags for tag in TAGS)


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Yield a list to which every read inside the block adds its line of the package.

    Functions are watched in every thread, operators in this one. Not by a TorchFunctionMode: `backward` is such a
    function itself, and while it runs the mode sees nothing.
    """
    reads = _Reads()
    with ExitStack() as stack:
        for owner, name, condition in _functions():
            stack.enter_context(patch.object(owner, name, reads.watched(getattr(owner, name), condition)))
        stack.enter_context(_Operators(reads))
        yield reads.lines
