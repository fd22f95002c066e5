"""Counts the places where the host reads what a device computed, and on an accelerator would wait for it.

On the CPU nothing waits, so that such a read costs nothing and is not noticed. What reads is known, though: `item`,
`tolist`, `bool` and their like, operators whose result has a size that depends on the data (`nonzero`, a boolean index,
`unique`), and those that look at their input to check it (`bincount`). Copies to a device count too where the host
waits for them. A read through device.start_read is one read, however many numbers it brings. Tensors that stay on the
host everywhere are not to be told from the others, so that their reads count as well.
"""

import traceback
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Functions that never become an operator on the CPU: they read memory as it is.
FUNCTIONS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}

OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive",
             "unique_dim", "equal", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def _package_line() -> str:
    """Return the innermost line of the package, or of its caller, that led here."""
    frames = [frame for frame in traceback.extract_stack() if "host_reads" not in frame.filename]
    own = [frame for frame in frames if "megatron_deepseek" in frame.filename.rpartition("site-packages")[2]]
    frame = (own or frames)[-1]
    return f"{frame.filename.rpartition('megatron_deepseek/')[2]}: {frame.name}: {frame.line}"


MADE_OF_NUMBERS = {torch.tensor, torch.as_tensor}


def _copies_and_waits(function, args: tuple, kwargs: dict) -> bool:
    """Whether a function brings numbers of the host to a device so that the host waits: not with `non_blocking`."""
    if function in MADE_OF_NUMBERS:
        return kwargs.get("device") is not None
    if function is not torch.Tensor.to or kwargs.get("non_blocking"):
        return False
    return any(isinstance(each, torch.device | str) for each in (*args[1:], *kwargs.values()))


class _Functions(TorchFunctionMode):
    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FUNCTIONS or _copies_and_waits(function, args, kwargs):
            self.reads.append(_package_line())
        return function(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _reads(operator, args, kwargs):
            self.reads.append(_package_line())
        return operator(*args, **kwargs)


def _reads(operator, args: tuple, kwargs: dict) -> bool:
    name = operator.overloadpacket.__name__
    if name in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and isinstance(args[0], torch.Tensor) and not isinstance(args[-1], int)
    return name in OPERATORS


@contextmanager
def host_reads():
    """Yield a list to which every read of this thread inside the block adds its line of the package."""
    reads: list[str] = []
    with ExitStack() as modes:
        modes.enter_context(_Functions(reads))
        modes.enter_context(_Operators(reads))
        yield reads
