"""Follows every byte that tensors take: when each storage is made, resized and freed, in which act and by which line.

It sees the results of operators (a TorchDispatchMode), the end of a storage (a weak reference) and FSDP's resizing of
storages, which is no operator. What an operator allocates inside and frees before it returns is not seen. It works for
fake tensors and for real ones alike, so that a run of real ranks can be compared with a dry run.

torch.distributed._tools.mem_tracker does the same for modules and without pipelines or lines of code; the way to see
the end and the resizing of a storage is its.
"""

import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from megatron_deepseek.dry_run.lines import line_of
from megatron_deepseek.parallel.watch import Act
from megatron_deepseek.torch_private import FakeTensor, TorchDispatchMode

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, FakeTensor})


class Allocation:
    """A storage: the act that made it (None between acts), the line of code, what it is (`label`, None while nobody has
    said) and whose (`of`, such as a parameter's name), and whether it outlived its act.
    """

    __slots__ = ("act", "line", "label", "of", "outlived", "size", "shape", "dtype")

    def __init__(self, act: "Interval", line: str, tensor: torch.Tensor):
        self.act, self.line, self.label, self.of, self.outlived, self.size = act, line, None, None, False, 0
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


class Interval:
    """The time of an act of one thread, or between two; `alive` are the allocations made in it that still live."""

    __slots__ = ("act", "alive")

    def __init__(self, act: Act | None):
        self.act, self.alive = act, set()


class StorageLog(TorchDispatchMode):
    """The log of all storages that are made while it is entered; also the pipeline's watch (parallel/watch.py).

    `events` are pairs: which allocation, and its bytes from then on. `acts` are pairs: the number of events before it,
    and the act that begins, or None where one ends. `on_end` is called when an act ends.
    """

    def __init__(self, on_end: Callable[[], None] | None = None):
        super().__init__()
        self._on_end = on_end
        self.allocations: list[Allocation] = []
        self.events = array("q"), array("q")
        self.acts: list[tuple[int, Act | None]] = []
        self._of_storage: dict[int, tuple[int, weakref.ref]] = {}
        self._between = Interval(None)
        self._current: dict[int, Interval] = {}  # by thread

    @contextmanager
    def watching(self) -> Iterator["StorageLog"]:
        """Enter the log, and see storages being resized too, which is no operator."""
        resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resizing(resize)
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize

    def now(self) -> str:
        """Return the act of this thread, or which one has ended last."""
        interval = self._current.get(threading.get_ident())
        if interval is not None:
            return str(interval.act)
        last = next((act for _, act in reversed(self.acts) if act is not None), None)
        return "before the first act" if last is None else f"after {last}"

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.prim.device.default:  # of each fake tensor, again and again
            return args[0].fake_device
        if not _PLAIN.issuperset(types):
            return NotImplemented  # a DTensor or tiles in FP8: their own operators come here next
        result = operator(*args, **(kwargs or {}))
        given = () if operator is torch.ops.aten.lift_fresh.default else (*args, *(kwargs or {}).values())
        for tensor in _tensors(result):
            self._note(tensor, given)
        return result

    @contextmanager
    def __call__(self, act: Act) -> Iterator[None]:
        """Be told of an act of the pipeline."""
        thread, interval = threading.get_ident(), Interval(act)
        self._end(self._between)
        self._current[thread] = interval
        self.acts.append((len(self.events[0]), act))
        try:
            yield
        finally:
            del self._current[thread]
            self.acts.append((len(self.events[0]), None))
            self._end(interval)
            self._between = Interval(None)
            if self._on_end is not None:
                self._on_end()

    def label(self, tensor: torch.Tensor, name: str, of: str | None = None) -> None:
        """Say what the storage of a tensor, or of a DTensor's own part, is and whose, if it was made under this log."""
        tensor = getattr(tensor, "_local_tensor", tensor)
        found = self._of_storage.get(tensor.untyped_storage()._cdata)
        if found is not None:
            allocation = self.allocations[found[0]]
            allocation.label, allocation.of = name, of

    def _end(self, interval: Interval) -> None:
        for allocation in interval.alive:
            allocation.outlived = True
        interval.alive.clear()

    def _note(self, tensor: torch.Tensor, given) -> None:
        """Note a result's storage if it is new or has another size; that of an argument is not new, but a back end's of
        collectives, of which operators only make views.
        """
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        found = self._of_storage.get(key)
        if found is not None:
            if self.allocations[found[0]].size != size:
                self._size(found[0], size)
            return
        if any(each.untyped_storage()._cdata == key for each in _tensors(given)):
            return
        line = line_of(sys._getframe(2))
        if line is None:
            return
        number, interval = len(self.allocations), self._current.get(threading.get_ident(), self._between)
        allocation = Allocation(interval, line, tensor)
        self.allocations.append(allocation)
        interval.alive.add(allocation)
        self._of_storage[key] = number, weakref.ref(storage, partial(self._freed, key, number))
        self._size(number, size)

    def _size(self, number: int, size: int) -> None:
        self.allocations[number].size = size
        self.events[0].append(number)
        self.events[1].append(size)

    def _freed(self, key: int, number: int, reference: weakref.ref) -> None:
        del self._of_storage[key]
        allocation = self.allocations[number]
        allocation.act.alive.discard(allocation)
        if allocation.size:
            self._size(number, 0)

    def _resizing(self, resize):
        def resized(storage, size):
            result = resize(storage, size)
            found = self._of_storage.get(storage._cdata)
            if found is not None:
                self._size(found[0], storage.nbytes())
            return result

        return resized


def _tensors(result) -> Iterator[torch.Tensor]:
    """Yield the tensors of an operator's result that have memory of their own, as wrappers of others have not."""
    if type(result) in _PLAIN:
        yield result
    elif isinstance(result, tuple | list):
        for each in result:
            yield from _tensors(each)
