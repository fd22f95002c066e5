"""Recompute what a cheap producer made instead of saving it for its consumer's backward.

    with recomputed(producer, x) as hidden:
        y = consumer(hidden)

Autograd would save `hidden` for the consumer's backward. Here a note is saved in its place, and the backward runs the
producer again from x. Megatron-LM frees such outputs by hand (CheckpointWithoutOutput); saved-tensor hooks do the same
without touching storages.
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
    """Yield producer(*inputs), with everything saved as usual: the counterpart of `recomputed` that saves no memory."""
    yield producer(*inputs)


class _Keep(torch.autograd.Function):
    """Saves its inputs as any operator does, so that an outer `recomputed` may save a note in their place."""

    @staticmethod
    def forward(ctx, anchor, *inputs):
        ctx.save_for_backward(*inputs)
        return anchor.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("nothing is computed from what is kept")


def keep(inputs: tuple[torch.Tensor, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Save `inputs` and return a function that gives them back in the backward.

    Hooks for saved tensors apply to their parts as to an operator's. Inputs that need no gradient are saved as well:
    weights of the producer or the consumer may still need one.
    """
    if not torch.is_grad_enabled():
        return lambda: inputs
    parts, together = zip(*map(apart, inputs))
    anchor = torch.empty(0, requires_grad=True)
    kept = _Keep.apply(anchor, *chain.from_iterable(parts))  # held: torch 2.11 frees what a node saved with its output
    return partial(_fetch, kept, together, [len(each) for each in parts])


def _fetch(kept: torch.Tensor, together: tuple[Callable, ...], sizes: list[int]) -> tuple[torch.Tensor, ...]:
    saved = iter(kept.grad_fn.saved_tensors)
    return tuple(make(*islice(saved, size)) for make, size in zip(together, sizes, strict=True))


def _hooks_around() -> tuple[Callable, Callable]:
    """Return the hooks for saved tensors that this code runs under; torch applies only the innermost of several."""
    return _top_saved_tensors_default_hooks(True) or (lambda tensor: tensor, lambda tensor: tensor)


def _parts(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the ordinary tensors of which a producer's outputs are made."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(part for output in outputs for part in parts_of(output))


class RecomputeHandle:
    """What autograd saves in place of tensors that `make` can make again.

    They are made at the first reading, and freed at the last: after as many readings as there are notes.
    """

    def __init__(self, make: Callable[[], tuple[torch.Tensor, ...]]):
        self.make = make
        self.num_notes = self.num_read = 0
        self.made: tuple[torch.Tensor, ...] = ()

    def note(self, index: int, tensor: torch.Tensor):
        """Return a note of `tensor`, which is a view of the storage of output number `index` of `make`."""
        self.num_notes += 1
        return index, tensor.size(), tensor.stride(), tensor.storage_offset()

    def read(self, note) -> torch.Tensor:
        """Return the tensor of a note, making the outputs again unless they are there."""
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
    """Yield producer(*inputs); run the producer again in the backward instead of saving its outputs.

    What operators inside the block would save of the outputs is replaced by a note. The producer must be deterministic
    and free of collectives, and must own the storages of its outputs.
    """
    outputs = producer(*inputs)
    if not torch.is_grad_enabled():
        yield outputs
        return
    handle = RecomputeHandle(partial(_made_by, producer, keep(inputs)))
    index_of_storage = {part.untyped_storage()._cdata: i for i, part in enumerate(_parts(outputs))}
    pack_other, unpack_other = _hooks_around()

    def pack(tensor):
        index = index_of_storage.get(tensor.untyped_storage()._cdata)
        return (None, pack_other(tensor)) if index is None else (handle, handle.note(index, tensor))

    def unpack(packed):
        its_handle, saved = packed
        return unpack_other(saved) if its_handle is None else its_handle.read(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield outputs
