"""The regions of a whole parameter that a rank's shard is made of.

A shard is one region of the whole, except where several matrices are stacked in one dimension and each is divided: half
of the experts' gate rows and half of their up rows are two regions of `gate_up_proj` [E, 2I, H]. `stacked_shard` is the
placement of such a shard; DTensor computes with it, but code that works by global offsets (initial weights,
checkpoints) must take it region by region.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from megatron_deepseek.torch_private import (
    DTensorSpec,
    LocalShardsWrapper,
    TensorMeta,
    _compute_local_shape_and_global_offset,
    _StridedShard,
)


def stacked_shard(dim: int, matrices: int) -> _StridedShard:
    """Return the placement that gives each rank its part of each of `matrices` matrices, stacked along `dim`.

    `dim` is not 0: there FSDP uses the same kind of placement for shards of shards, which are single regions.
    """
    assert dim > 0, dim
    return _StridedShard(dim, split_factor=matrices)


def is_first_copy(tensor: DTensor) -> bool:
    """Return whether this rank is the first of those that have the same shard, so that it counts there alone."""
    replicated = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in replicated)


@dataclass(frozen=True, eq=False)
class ShardRegion:
    """A region of the whole that begins at `offset`; `local` is the part of the shard that holds it, not a copy."""

    offset: tuple[int, ...]
    local: torch.Tensor

    def contiguous(self) -> "list[ShardRegion]":
        """Return the region in parts that are contiguous in memory: itself, or its slices along dimension 0."""
        if self.local.is_contiguous():
            return [self]
        first, *rest = self.offset
        return [ShardRegion((first + row, *rest), part) for row, part in enumerate(self.local.split(1))]


def regions(shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
            ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (offset, shape) of each region of the whole that the rank at `coordinate` of a mesh holds, in order."""
    local, offset = _compute_local_shape_and_global_offset(shape, mesh_shape, list(coordinate), placements)
    stacked = next((placement for size, placement in zip(mesh_shape, placements)
                    if size > 1 and _is_stacked(placement)), None)
    if stacked is None:
        return [(tuple(offset), tuple(local))]
    dim, matrices = stacked.dim, stacked.split_factor
    part = (*local[:dim], local[dim] // matrices, *local[dim + 1:])
    rows = shape[dim] // matrices
    return [((*offset[:dim], offset[dim] + number * rows, *offset[dim + 1:]), part) for number in range(matrices)]


def shard_regions(tensor: DTensor) -> list[ShardRegion]:
    """Return the regions of this rank's shard."""
    local, mesh = tensor.to_local(), tensor.device_mesh
    found = regions(tensor.shape, mesh.shape, mesh.get_coordinate(), tensor.placements)
    if len(found) == 1:
        assert tuple(local.shape) == found[0][1], (local.shape, found)
        return [ShardRegion(found[0][0], local)]
    dim = tensor.placements[_stacked_axis(tensor)].dim
    parts = local.chunk(len(found), dim)
    assert [tuple(part.shape) for part in parts] == [shape for _, shape in found], (local.shape, found)
    return [ShardRegion(offset, part) for (offset, _), part in zip(found, parts)]


def whole(tensor: DTensor) -> torch.Tensor:
    """Return the whole tensor, gathered from every rank.

    Stacked shards are gathered region by region: DTensor fails to gather them together with FSDP's.
    """
    if _stacked_axis(tensor) is None:
        return tensor.full_tensor()
    found = [(region.offset, region.local.detach().cpu()) for region in shard_regions(tensor)]
    for group in tensor.device_mesh.get_all_groups():
        of_group: list = [None] * group.size()
        dist.all_gather_object(of_group, found, group=group)
        found = [region for of_rank in of_group for region in of_rank]
    result = torch.empty(tensor.shape, dtype=tensor.dtype)
    for offset, part in found:
        result[tuple(slice(begin, begin + size) for begin, size in zip(offset, part.shape))] = part
    return result.to(tensor.device)


def for_checkpoint(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, sharing its memory, in a form that torch.distributed.checkpoint can write and read."""
    if not isinstance(tensor, DTensor) or _stacked_axis(tensor) is None:
        return tensor
    every = shard_regions(tensor)
    if len(every) == 1:
        return tensor
    held = [region for region in every if region.local.numel()]
    local = LocalShardsWrapper([region.local for region in held], [region.offset for region in held])
    meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
    return DTensor(local, DTensorSpec(tensor.device_mesh, tensor.placements, meta), requires_grad=False)


def _is_stacked(placement: Placement) -> bool:
    return isinstance(placement, _StridedShard) and placement.dim > 0


def _stacked_axis(tensor: DTensor) -> int | None:
    """Return the mesh axis, of any size, over which stacked matrices are divided."""
    return next((axis for axis, placement in enumerate(tensor.placements) if _is_stacked(placement)), None)
