"""The hash of a frozen base: of its numbers by name and place, the same for every layout and file format.

Each number's bits, of float32 at least, are mixed with its name and its place in the whole parameter, and the results
are added up modulo 2**64, over shards and ranks in any order. It finds another base, and weights that were changed; it
is no protection against somebody who wants a changed base to look the same.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_deepseek.model.architecture.adapters import is_adapter
from megatron_deepseek.model.architecture.parameters import EMBEDDING
from megatron_deepseek.model.init import ELEMENTS_AT_A_TIME, global_index, split_mix, stream_key
from megatron_deepseek.parallel.shards import shard_regions

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


@torch.no_grad()
def base_hash(stages: Sequence[nn.Module], device: torch.device) -> str:
    """Return the hash of all parameters but the adapters, on every rank. Every rank of the job calls it."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, parameter in _counted(stages):
        for region in shard_regions(parameter):
            for part in region.contiguous():
                total += _hash(name, parameter.shape, part.local, part.offset).to(device)
    dist.all_reduce(total)
    return f"{total.item() & (1 << 64) - 1:016x}"


def _counted(stages: Sequence[nn.Module]) -> Iterator[tuple[str, DTensor]]:
    """Yield the base's parameters that this rank counts: of TP replicas and of the embedding's copies the first."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if is_adapter(name) or (name == EMBEDDING and not stage.stage.embedding):
                continue
            replicated = [dim for dim, placement in enumerate(parameter.placements)
                          if isinstance(placement, Replicate)]
            if all(parameter.device_mesh.get_local_rank(dim) == 0 for dim in replicated):
                yield name, parameter


def _hash(name: str, shape: torch.Size, local: torch.Tensor, offset: tuple[int, ...]) -> torch.Tensor:
    flat, key = local.reshape(-1), stream_key(name)
    wide, total = torch.promote_types(flat.dtype, torch.float32), torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), ELEMENTS_AT_A_TIME):
        stop = min(start + ELEMENTS_AT_A_TIME, flat.numel())
        index = global_index(start, stop, shape, local.shape, offset, flat.device)
        bits = flat[start:stop].to(wide).view(_BITS[wide])
        total += split_mix(bits.to(torch.int64), split_mix(index, key)).sum()
    return total
