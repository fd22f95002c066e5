"""--optimizer-cpu-offload on a GPU: what FSDP brings to the device and back; where all is on a CPU it copies nothing.

Before a unit is gathered its shards are copied to the device, in the master dtype, and are there until they are in the
input of the all-gather. Reduced gradients are one tensor of the device, whose parts are copied to the host; then it is
freed. Here the same copies are made, so that a log of storages sees them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_deepseek.torch_private import FakeTensor, FSDPParam


@contextmanager
def shards_on_host() -> Iterator[None]:
    """Make FSDP copy shards between host and device for a `with` block, where it is told to keep them on the host."""
    inputs, as_shard = FSDPParam.all_gather_inputs, FSDPParam.to_sharded_dtensor
    FSDPParam.all_gather_inputs = property(lambda parameter: _inputs_on_device(parameter, inputs.fget))
    FSDPParam.to_sharded_dtensor = lambda parameter, tensor: as_shard(parameter, _on_host(parameter, tensor))
    try:
        yield
    finally:
        FSDPParam.all_gather_inputs, FSDPParam.to_sharded_dtensor = inputs, as_shard


def _inputs_on_device(parameter: FSDPParam, inputs) -> list[torch.Tensor]:
    """Return what is gathered of a parameter, made of a copy of its shard."""
    kept = parameter._sharded_param_data
    if parameter.offload_to_cpu:
        parameter._sharded_param_data = kept.clone()
    try:
        return inputs(parameter)
    finally:
        parameter._sharded_param_data = kept


def _on_host(parameter: FSDPParam, tensor: torch.Tensor) -> torch.Tensor:
    """Return a reduced gradient as a tensor of its own; other tensors, of which shards are made, as they are."""
    return tensor.clone() if parameter.offload_to_cpu and isinstance(tensor, FakeTensor) else tensor
