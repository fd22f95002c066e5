"""The hash of a frozen base: of its numbers by name and place, the same for every layout and file format.

Each number's bits, of float32 at least, are mixed with its name and its place in the whole parameter, and the results
are added up modulo 2**64, over shards and ranks in any order. It finds another base, and weights that were changed; it
is no protection against somebody who wants a changed base to look the same.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.model.architecture.adapters import is_adapter
from megatron_deepseek.model.architecture.parameters import EMBEDDING
from megatron_deepseek.model.init import global_index
from megatron_deepseek.ops.hashing import ELEMENTS_AT_A_TIME, split_mix, stream_key
from megatron_deepseek.parallel.shards import is_first_copy, shard_regions

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


@torch.no_grad()
def base_hash(stages: Sequence[nn.Module], device: torch.device, held: torch.Tensor | None = None) -> str:
    """Return the hash of all parameters but the adapters, on every rank. Every rank of the job calls it.

    `held`: this rank's part of it for weights that are kept as bytes (base_weights.py), None if there are none.
    """
    total = torch.zeros((), dtype=torch.int64, device=device) if held is None else held.clone()
    for name, parameter in _counted(stages):
        for region in shard_regions(parameter):
            for part in region.contiguous():
                total += hash_of(name, parameter.shape, part.local, part.offset).to(device)
    dist.all_reduce(total)
    return f"{total.item() & (1 << 64) - 1:016x}"


def _counted(stages: Sequence[nn.Module]) -> Iterator[tuple[str, DTensor]]:
    """Yield the base's parameters that this rank counts: of TP replicas and of the embedding's copies the first."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if is_adapter(name) or not parameter.is_floating_point() or (
                    name == EMBEDDING and not stage.stage.embedding):
                continue
            if is_first_copy(parameter):
                yield name, parameter


def hash_of(name: str, shape: torch.Size, local: torch.Tensor, offset: tuple[int, ...]) -> torch.Tensor:
    """Return the hash of the part `local`, at `offset`, of a parameter of `shape`."""
    flat, key = local.reshape(-1), stream_key(name)
    wide, total = torch.promote_types(flat.dtype, torch.float32), torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), ELEMENTS_AT_A_TIME):
        stop = min(start + ELEMENTS_AT_A_TIME, flat.numel())
        index = global_index(start, stop, shape, local.shape, offset, flat.device)
        bits = flat[start:stop].to(wide).view(_BITS[wide])
        total += split_mix(bits.to(torch.int64), split_mix(index, key)).sum()
    return total
