"""Recompute what a cheap producer made instead of keeping it for its consumer's backward.

    with recomputed(producer, x) as hidden:
        y = consumer(hidden)

Autograd would keep `hidden` for the consumer's backward. Here the consumer's saved references to it are replaced by a
note, and the backward runs the producer again from x. Megatron-LM frees such outputs by hand
(CheckpointWithoutOutput); saved-tensor hooks do the same without touching storages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice

import torch

from megatron_deepseek.ops.fp8.block_scaled import apart, parts_of
from megatron_deepseek.torch_private import _top_saved_tensors_default_hooks

Producer = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@contextmanager
def kept(producer: Producer, *inputs: torch.Tensor) -> Iterator:
    """Give producer(*inputs) to a `with` block, everything kept: what `recomputed` is where memory is no matter."""
    yield producer(*inputs)


class _Keep(torch.autograd.Function):
    """Saves its inputs as any operator does, so that an outer `recompute` may keep a note in their place."""

    @staticmethod
    def forward(ctx, anchor, *inputs):
        ctx.save_for_backward(*inputs)
        return anchor.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("nothing is computed from what is kept")


def keep(inputs: tuple[torch.Tensor, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """How to get `inputs` back in the backward; hooks for saved tensors apply to their parts as to an operator's.

    Also inputs that need no gradient: the producer's and the consumer's weights may.
    """
    if not torch.is_grad_enabled():
        return lambda: inputs
    parts, together = zip(*map(apart, inputs))
    anchor = torch.empty(0, requires_grad=True)
    kept = _Keep.apply(anchor, *chain.from_iterable(parts))  # torch 2.11 frees what a node saved when its output goes
    return partial(_fetch, kept, together, [len(each) for each in parts])


def _fetch(kept: torch.Tensor, together: tuple[Callable, ...], sizes: list[int]) -> tuple[torch.Tensor, ...]:
    saved = iter(kept.grad_fn.saved_tensors)
    return tuple(make(*islice(saved, size)) for make, size in zip(together, sizes, strict=True))


def _hooks_around() -> tuple[Callable, Callable]:
    """The hooks for saved tensors that this code runs under; torch applies only the innermost of several."""
    return _top_saved_tensors_default_hooks(True) or (lambda tensor: tensor, lambda tensor: tensor)


def _parts(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The ordinary tensors of a producer's outputs."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(part for output in outputs for part in parts_of(output))


class RecomputeHandle:
    """RecomputeHandle in the place of tensors that `make` makes again: at the first reading, kept until the last."""

    def __init__(self, make: Callable[[], tuple[torch.Tensor, ...]]):
        self.make = make
        self.num_notes = self.num_read = 0
        self.made: tuple[torch.Tensor, ...] = ()

    def note(self, index: int, tensor: torch.Tensor):
        """Of `tensor`, a view of the storage that number `index` of what is made will have."""
        self.num_notes += 1
        return index, tensor.size(), tensor.stride(), tensor.storage_offset()

    def read(self, note) -> torch.Tensor:
        if not self.made:
            self.made = self.make()
        index, size, stride, offset = note
        tensor = self.made[index].as_strided(size, stride, offset)
        self.num_read += 1
        if self.num_read % self.num_notes == 0:
            self.made = ()
        return tensor


def _made_by(producer: Producer, inputs: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return _parts(producer(*inputs()))


@contextmanager
def recomputed(producer: Producer, *inputs: torch.Tensor) -> Iterator:
    """Give producer(*inputs) to a `with` block. What operators inside the block save of it for their backward is
    replaced by a note, and the backward runs the producer again.

    The producer must be deterministic and free of collectives; its outputs' storages must be its own.
    """
    outputs = producer(*inputs)
    if not torch.is_grad_enabled():
        yield outputs
        return
    again = RecomputeHandle(partial(_made_by, producer, keep(inputs)))
    index_of_storage = {part.untyped_storage().data_ptr(): i for i, part in enumerate(_parts(outputs))}
    pack_other, unpack_other = _hooks_around()

    def pack(tensor):
        index = index_of_storage.get(tensor.untyped_storage().data_ptr())
        return (None, pack_other(tensor)) if index is None else (again, again.note(index, tensor))

    def unpack(packed):
        notes, what = packed
        return unpack_other(what) if notes is None else notes.read(what)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield outputs
