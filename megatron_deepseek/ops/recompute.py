"""Recompute what a cheap producer made instead of keeping it for its consumer's backward.

    y = consumer(producer(x))

Autograd would keep producer(x) for the consumer's backward. Here the consumer's saved references to it are replaced
by a note, and the backward runs the producer again from x. Megatron-LM frees such outputs by hand
(CheckpointWithoutOutput); saved-tensor hooks do the same without touching storages.
"""

from collections.abc import Callable

import torch

from megatron_deepseek.ops.block_scaled import parts_of

Producer = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def compose(producer: Producer, inputs: tuple[torch.Tensor, ...], consumer: Callable):
    """consumer(*producer(*inputs)), everything kept."""
    outputs = producer(*inputs)
    return consumer(*outputs) if isinstance(outputs, tuple) else consumer(outputs)


class _Keep(torch.autograd.Function):
    """Saves its inputs as any operator does, so that an outer `recompute` may keep a note in their place."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("nothing is computed from what is kept")


def _keep(inputs: tuple[torch.Tensor, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """How to get `inputs` back in the backward."""
    node = _Keep.apply(*inputs).grad_fn
    return (lambda: inputs) if node is None else (lambda: node.saved_tensors)


def _parts(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The ordinary tensors of a producer's outputs."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(part for output in outputs for part in parts_of(output))


class _Recomputed:
    """The producer's outputs, made again at their first use in the backward and dropped after the last."""

    def __init__(self, producer: Producer, inputs: tuple[torch.Tensor, ...]):
        self.producer, self.inputs = producer, _keep(inputs)
        self.num_notes = self.num_read = 0
        self.outputs: tuple[torch.Tensor, ...] = ()

    def note(self, index: int, tensor: torch.Tensor):
        self.num_notes += 1
        return index, tensor.size(), tensor.stride(), tensor.storage_offset()

    def read(self, note) -> torch.Tensor:
        if not self.outputs:
            with torch.no_grad():
                self.outputs = _parts(self.producer(*self.inputs()))
        index, size, stride, offset = note
        tensor = self.outputs[index].as_strided(size, stride, offset)
        self.num_read += 1
        if self.num_read % self.num_notes == 0:
            self.outputs = ()
        return tensor


def recompute(producer: Producer, inputs: tuple[torch.Tensor, ...], consumer: Callable):
    """As `compose`, but the consumer's backward gets producer(*inputs) by running the producer again.

    The producer must be deterministic and free of collectives; its outputs' storages must be its own.
    """
    if not torch.is_grad_enabled():
        return compose(producer, inputs, consumer)
    outputs = producer(*inputs)
    again = _Recomputed(producer, inputs)
    index_of_storage = {part.untyped_storage().data_ptr(): i for i, part in enumerate(_parts(outputs))}

    def pack(tensor):
        index = index_of_storage.get(tensor.untyped_storage().data_ptr())
        return tensor if index is None else again.note(index, tensor)

    def unpack(packed):
        return packed if isinstance(packed, torch.Tensor) else again.read(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return consumer(*outputs) if isinstance(outputs, tuple) else consumer(outputs)
