"""A record of a rank's collectives: of each its kind, group, bytes and place in the code, in the order in which they
begin.

PyTorch hands every collective to its process group as an operator, and a dispatch mode sees operators. So nothing has
to report to the record: it has FSDP2's collectives, those of the pipeline's schedules and DTensor's beside this
project's own, over any backend, also the `fake` one. A mode sees the thread that entered it, and the backward that this
thread starts; another thread has to enter the record by itself.

What a rank sends is the least that any algorithm needs, with x bytes of a tensor and n ranks:

    all_reduce      2 x (n - 1) / n     a reduce-scatter and an all-gather of its n parts
    all_gather      x (n - 1)           x is this rank's part
    reduce_scatter  x (n - 1)           x is this rank's part of the sum
    all_to_all      the rows for other ranks
    broadcast       x at the source, which the others pass on
    reduce, gather  x on each rank but the destination
    scatter         the parts of other ranks, at the source
    send            x; the other side's recv sends nothing, and neither does a barrier
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_deepseek.torch_private import TorchDispatchMode, _resolve_process_group

PACKAGE = "megatron_deepseek/"


@dataclass(frozen=True)
class Collective:
    """A collective as one rank began it.

    `kind` is a key of the table above, or "recv" or "barrier". `group` is the description of its process group, which
    for an axis of a mesh is "mesh_" and the axis; `ranks` are the job's numbers of its ranks. `sent`: bytes that this
    rank has to send to others; `received`: bytes that arrive by a recv. `peer`: the other side of a send or recv, by
    its number in the job. `dtype` is that of the numbers. `place` is where in the program it began.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    sent: int
    dtype: torch.dtype
    place: str
    peer: int | None = None
    received: int = 0


def code_place() -> str:
    """Return the innermost line of the package that led here, as "parallel/tensor.py:70 enter".

    Without any of the package it is the innermost line outside of site-packages. Lines of this file do not count.
    """
    frame = sys._getframe(1)  # noqa: SLF001 (CPython's; `traceback` reads every source line, which takes long)
    frames = [each for each in _outwards(frame) if each.f_code.co_filename != __file__]
    of_package = (each for each in frames if PACKAGE in _below_site_packages(each))
    of_programs = (each for each in frames if "site-packages" not in each.f_code.co_filename)
    found = next(of_package, None) or next(of_programs, frames[0])
    path = found.f_code.co_filename
    return f"{path.rpartition(PACKAGE)[2] or path}:{found.f_lineno} {found.f_code.co_name}"


def _below_site_packages(frame) -> str:
    return frame.f_code.co_filename.rpartition("site-packages")[2]


def _outwards(frame) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back


class RecordedCollectives(TorchDispatchMode):
    """While it is entered, adds each collective of this thread to `calls`.

    `place` says where one begins, `code_place` unless given; a caller that knows the schedule can say which stage and
    micro-batch are at work.
    """

    def __init__(self, place: Callable[[], str] = code_place):
        super().__init__()
        self.calls: list[Collective] = []
        self._place = place

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(each, dist.tensor.DTensor) for each in types):
            return NotImplemented  # DTensor's own operators follow, on local tensors
        if operator.namespace in _NAMESPACES:
            name = operator.overloadpacket.__name__
            if name not in _LOCAL:
                self._add(_NAMESPACES[operator.namespace][name], operator, args, kwargs or {})
        return operator(*args, **(kwargs or {}))

    def _add(self, call: "_Call", operator, args: tuple, kwargs: dict) -> None:
        named = dict(zip((each.name for each in operator._schema.arguments), args)) | kwargs  # noqa: SLF001 (torch's)
        group = _group_of(named)
        ranks = tuple(dist.get_process_group_ranks(group))
        tensors = list(_tensors(named[call.tensors]))
        mine = sum(each.nbytes for each in tensors)
        sent = call.sent(mine, named, group)
        peer = next((named[key] for key in ("dst", "src") if key in named and call.kind in ("send", "recv")), None)
        self.calls.append(Collective(
            call.kind, group.group_desc, ranks, sent, tensors[0].dtype if tensors else torch.uint8, self._place(),
            None if peer is None else ranks[peer], mine if call.kind == "recv" else 0))


Sent = Callable[[int, dict[str, Any], dist.ProcessGroup], int]


@dataclass(frozen=True)
class _Call:
    """How an operator is read: its kind, the argument with x of the table above, and what is sent of it."""

    kind: str
    tensors: str
    sent: Sent


def _to_each(mine, named, group) -> int:
    return mine * (group.size() - 1)


def _all_reduced(mine, named, group) -> int:
    return 2 * mine * (group.size() - 1) // group.size()


def _scattered(mine, named, group) -> int:
    """Return what is sent of an input that holds a part for each rank."""
    return mine * (group.size() - 1) // group.size()


def _rows_to_others(mine, named, group) -> int:
    sizes = named["input_split_sizes"]
    if not sizes:
        return _scattered(mine, named, group)  # equal parts
    rows = sum(sizes)
    return mine * (rows - sizes[group.rank()]) // rows if rows else 0


def _parts_of_others(mine, named, group) -> int:
    """Return the bytes of a list of tensors, one for each rank, without this rank's own."""
    parts = list(_tensors(named["input_tensors"]))
    return mine - parts[group.rank()].nbytes if parts else 0


def _at_source(mine, named, group) -> int:
    source = named["root_rank"] if "root_rank" in named else named["src"]
    return mine if group.rank() == source and group.size() > 1 else 0


def _but_at_destination(mine, named, group) -> int:
    return 0 if group.rank() == named["root_rank"] else mine


def _all(mine, named, group) -> int:
    return mine


def _nothing(mine, named, group) -> int:
    return 0


# Operators of the same namespaces that communicate nothing.
_LOCAL = {"wait_tensor", "_wrap_tensor_autograd", "check_for_nan"}

# By the names of torch's operators: those of process groups, and the functional ones, which DTensor calls.
_NAMESPACES = {"c10d": {
    "allreduce_": _Call("all_reduce", "tensors", _all_reduced),
    "allreduce_coalesced_": _Call("all_reduce", "tensors", _all_reduced),
    "allgather_": _Call("all_gather", "input_tensors", _to_each),
    "_allgather_base_": _Call("all_gather", "input_tensor", _to_each),
    "allgather_coalesced_": _Call("all_gather", "input_list", _to_each),
    "allgather_into_tensor_coalesced_": _Call("all_gather", "inputs", _to_each),
    "reduce_scatter_": _Call("reduce_scatter", "output_tensors", _to_each),
    "_reduce_scatter_base_": _Call("reduce_scatter", "output_tensor", _to_each),
    "reduce_scatter_tensor_coalesced_": _Call("reduce_scatter", "outputs", _to_each),
    "alltoall_base_": _Call("all_to_all", "input", _rows_to_others),
    "alltoall_": _Call("all_to_all", "input_tensors", _parts_of_others),
    "broadcast_": _Call("broadcast", "tensors", _at_source),
    "reduce_": _Call("reduce", "tensors", _but_at_destination),
    "gather_": _Call("gather", "input_tensors", _but_at_destination),
    "scatter_": _Call("scatter", "input_tensors", _parts_of_others),
    "send": _Call("send", "tensors", _all),
    "recv_": _Call("recv", "tensors", _nothing),
    "barrier": _Call("barrier", "tensor", _nothing),
}, "_c10d_functional": {
    "all_reduce": _Call("all_reduce", "input", _all_reduced),
    "all_reduce_": _Call("all_reduce", "input", _all_reduced),
    "all_reduce_coalesced": _Call("all_reduce", "inputs", _all_reduced),
    "all_gather_into_tensor": _Call("all_gather", "input", _to_each),
    "all_gather_into_tensor_coalesced": _Call("all_gather", "inputs", _to_each),
    "reduce_scatter_tensor": _Call("reduce_scatter", "input", _scattered),
    "reduce_scatter_tensor_coalesced": _Call("reduce_scatter", "inputs", _scattered),
    "all_to_all_single": _Call("all_to_all", "input", _rows_to_others),
    "broadcast": _Call("broadcast", "input", _at_source),
}}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _group_of(named: dict[str, Any]) -> dist.ProcessGroup:
    """Return the process group of an operator's arguments, which is one of them or named by one."""
    if "group_name" in named:
        return _resolve_process_group(named["group_name"])
    boxed = named["process_group"]
    return boxed if isinstance(boxed, dist.ProcessGroup) else dist.ProcessGroup.unbox(boxed)
