"""Counts the operators that are launched and the bytes that they move, by the part of a step that they belong to.

An operator moves what it reads and what it writes: each tensor's elements once, whatever a kernel does with caches.
Views move nothing, and neither do allocations. A gather reads the rows that it takes, not the table.

In the forward an operator belongs to the innermost part that is open. In the backward it belongs to the part whose
forward made its autograd node: nodes are numbered in the order in which they were made, so that a part is a range of
numbers. Two gradients of one tensor are added by autograd itself, by `add`, which no derivative here consists of; those
sums are a part of their own.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REST = "all else"
FORWARD, BACKWARD = "forward", "backward"

NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "detach",
           "alias", "lift_fresh", "_local_scalar_dense", "record_stream"}
ONLY_WRITTEN = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}  # whose first argument is not read
GATHERS = {"index_select", "gather", "embedding", "index", "nll_loss_forward"}  # read what they write, and indices
DENSE_OF_ROWS = {"nll_loss_backward"}  # writes a dense gradient of one number a row
DECLARED_ONLY = {("_fused_adamw_", "grads")}  # written only with a scale, which we do not give
SCATTERS = {"scatter_", "scatter_add_", "index_put_", "_index_put_impl_", "index_add_", "index_copy_"}


@dataclass
class Count:
    """Operators, and bytes read and written."""

    operators: int = 0
    bytes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.operators + other.operators, self.bytes + other.bytes)


def extent(tensor: torch.Tensor) -> int:
    """Return the bytes of the elements of a tensor, those that an expanded dimension repeats once."""
    return tensor.element_size() * prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)


class StepCounter(TorchDispatchMode):
    """While it is entered, adds every operator to `counts[part, FORWARD or BACKWARD]`.

    `accumulated` is the part that adding a micro-batch's gradient of a weight to those before belongs to.
    """

    def __init__(self, accumulated: str):
        super().__init__()
        self._accumulated = accumulated
        self.counts: dict[tuple[str, str], Count] = defaultdict(Count)
        self.by_operator: dict[tuple[str, str, str], Count] = defaultdict(Count)
        self._open, self._forced = [REST], []
        self._starts, self._parts = [0], [REST]
        self._between: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs in a `with` block, and its backward, as `name`."""
        self._open.append(name)
        self._begin(name)
        yield
        self._open.pop()
        self._begin(self._open[-1])

    @contextmanager
    def wherever(self, name: str) -> Iterator[None]:
        """Count what runs in a `with` block as `name`, also inside a backward of something else."""
        self._forced.append(name)
        yield
        self._forced.pop()

    @contextmanager
    def between_nodes(self, name: str) -> Iterator[None]:
        """Count what autograd does in a `with` block outside of its nodes, which is to add gradients, as `name`."""
        before, self._between = self._between, name
        yield
        self._between = before

    def _begin(self, name: str) -> None:
        self._starts.append(torch.autograd._get_sequence_nr())  # noqa: SLF001 (torch's; there is no public name)
        self._parts.append(name)

    def _place(self, name: str) -> tuple[str, str]:
        if self._forced:
            return self._forced[-1], FORWARD if self._between is None else BACKWARD
        if self._between is None:
            return self._open[-1], FORWARD
        node = torch._C._current_autograd_node()  # noqa: SLF001
        if node is not None and node.name() == "torch::autograd::AccumulateGrad":
            return self._accumulated, BACKWARD
        if node is None or name == "add":
            return self._between, BACKWARD
        return self._parts[bisect_right(self._starts, node._sequence_nr()) - 1], BACKWARD  # noqa: SLF001

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = operator(*args, **kwargs)
        moved = bytes_moved(operator, args, kwargs, given)
        if moved is not None:
            place = self._place(operator.overloadpacket.__name__)
            self.counts[place] += Count(1, moved)
            self.by_operator[(*place, str(operator))] += Count(1, moved)
        return given


def bytes_moved(operator, args: tuple, kwargs: dict, given) -> int | None:
    """Return what an operator reads and writes, None if it does no work on a device."""
    name = operator.overloadpacket.__name__
    if name in NO_WORK or operator.namespace in ("c10d", "_c10d_functional"):
        return None
    read, written = {}, {}
    arguments = operator._schema.arguments  # noqa: SLF001
    values = dict(zip((each.name for each in arguments), args)) | kwargs
    if name == "copy_" and _key(args[0]) == _key(args[1]):
        return None
    for argument in arguments:
        if (name, argument.name) in DECLARED_ONLY:
            read |= {_key(tensor): extent(tensor) for tensor in values[argument.name]}
            continue
        changed = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in (leaf for leaf in tree_leaves(values.get(argument.name)) if isinstance(leaf, torch.Tensor)):
            if changed:
                written[_key(tensor)] = extent(tensor)
            if not changed or not (name in ONLY_WRITTEN or argument.kwarg_only):
                read[_key(tensor)] = extent(tensor)
    made = {_key(leaf): extent(leaf) for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)}
    storages = {key[0] for key in read}
    if not written and all(key[0] in storages for key in made):
        return None  # a view
    if name in DENSE_OF_ROWS:
        return sum(made.values())
    if name in GATHERS:
        indices = sum(size for key, size in read.items() if key[-1] == torch.int64)
        return indices + 2 * sum(made.values())
    if name in SCATTERS:
        others = sum(size for key, size in read.items() if key not in written)
        values = max((size for key, size in read.items() if key not in written and key[-1] != torch.int64), default=0)
        return others + 2 * values
    return sum(read.values()) + sum((written | made).values())


def _key(tensor: torch.Tensor) -> tuple:
    """Return what tells tensors apart that are not the same elements of the same memory."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()),  # noqa: SLF001
            tensor.dtype)
