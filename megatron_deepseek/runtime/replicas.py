"""--check-weight-hash-across-dp-replicas-interval: whether all ranks that should have the same weights do.

Each rank gathers its weights as a forward does, unit by unit, and hashes them; hashes are compared among all ranks that
hold the same part of the same parameter: data and context ranks, tensor ranks that each hold a whole parameter, stages
with a copy of the embedding, and the routers' biases. What differs is a fault of the hardware or of this code.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megatron_deepseek.ops.fp8.weight import Fp8Weight, blocks_of
from megatron_deepseek.parallel.data import gathered_parameters
from megatron_deepseek.parallel.shards import shard_regions

MOST_NAMED = 8  # parameters in a message

Part = tuple[str, tuple[int, ...]]  # the name of a parameter, and where in it a region begins


class ReplicasDiffer(RuntimeError):
    """Raised on all ranks where some have other weights than others that should have the same."""


def check_replicas(stages: Iterable[nn.Module], iteration: int) -> None:
    """Compare all weights of the job. All ranks call this; raise ReplicasDiffer on all where some differ."""
    own = {part: digest for stage in stages for part, digest in _digests(stage)}
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, everyone)
    told = [None if everyone is None else describe_differences(everyone)]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise ReplicasDiffer(f"after iteration {iteration} not all ranks have the same weights: {told[0]}. The last "
                             "checkpoint was saved before, and the same command goes on from there")


def describe_differences(everyone: list[dict[Part, int]]) -> str | None:
    """Return which parameters differ, on which ranks, by the digests of all ranks; None where none does.

    Ranks in the minority are named, of equal halves those that are not with the lowest rank.
    """
    ranks_of: dict[Part, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, digests in enumerate(everyone):
        for part, digest in digests.items():
            ranks_of[part][digest].append(rank)
    found: dict[str, set[int]] = defaultdict(set)
    for (name, _), groups in ranks_of.items():
        usual = max(groups.values(), key=len)  # of several as large the first: the lowest ranks come first
        for ranks in groups.values():
            found[name].update(ranks if ranks is not usual else ())
    lines = [f"{name} on {_named(ranks)}" for name, ranks in found.items() if ranks]
    more = f" and {len(lines) - MOST_NAMED} more" if len(lines) > MOST_NAMED else ""
    return ", ".join(lines[:MOST_NAMED]) + more if lines else None


def _named(ranks: set[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def _digests(stage: nn.Module) -> Iterator[tuple[Part, int]]:
    """Yield the digest of each region of the gathered weights of a stage, and of its buffers that checkpoints have."""
    names = {parameter: name for name, parameter in stage.named_parameters(remove_duplicate=False)}
    for unit in (module for module in stage.modules() if isinstance(module, FSDPModule)):
        for shard, weight in gathered_parameters(unit):
            for offset, local in _regions(weight.detach()):
                yield (names[shard], offset), _digest(local)
    kept = stage.state_dict().keys()
    yield from (((name, ()), _digest(buffer)) for name, buffer in stage.named_buffers() if name in kept)


def _regions(weight: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    if isinstance(weight, DTensor):
        yield from ((region.offset, region.local) for region in shard_regions(weight))
    else:
        yield (0,) * weight.dim(), weight


def _digest(tensor: torch.Tensor) -> int:
    """Return a hash of the numbers of a tensor; of FP8 blocks those of numbers and scales."""
    digest = xxhash.xxh3_64()
    for part in _parts(tensor):
        copied = part.detach().to("cpu", copy=True).contiguous()  # FSDP cannot free what numpy has seen
        digest.update(copied.flatten().view(torch.uint8).numpy())
    return digest.intdigest()


def _parts(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    return blocks_of(tensor) if isinstance(tensor, Fp8Weight) else (tensor,)
