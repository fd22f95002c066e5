"""The regions of every tensor that each rank of a layout holds, found by sharding the model as training does.

The stages are built on the meta device in a job of torch's `fake` ranks, so there is no second description of the
shards that could drift from the first. One rank's build says what all ranks of its meshes hold, since a DTensor's
local shard depends on the rank's coordinates alone. So a few builds for each pipeline rank are enough.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from megatron_deepseek.checkpoint.dcp.files import DcpDirectory
from megatron_deepseek.checkpoint.job.state import MOMENTS, model_state, optimizer_state
from megatron_deepseek.checkpoint.native import OPTIMIZER, WEIGHTS
from megatron_deepseek.parallel.regions import Region
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import shape_stages, shard_stages
from megatron_deepseek.parallel.fake_job import fake_job
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.parallel.shards import regions

Holders = dict[Region, tuple[int, ...]]  # the regions of a tensor, and the ranks that hold each, in order
HoldersByTensor = dict[str, Holders]
_SEQ_LENGTH = 64  # any will do: it decides nothing about weights


@dataclass(frozen=True)
class ModelDivision:
    """A model divided over ranks: its layout, and the stages that its schedule places, decide which rank holds what."""

    model: ModelConfig
    layout: Layout
    stages: tuple[Stage, ...]
    schedule: str


def find_holders(division: ModelDivision) -> HoldersByTensor:
    """Return the holders of every saved tensor by its name, weights first, then moments.

    Tensors that are divided alike, as those of equal layers are, share one dictionary, for there are hundreds of
    thousands of regions.
    """
    found: dict[str, tuple[_Held, ...]] = {}
    for pp_rank in range(division.layout.pp):
        ranks_of_stage = division.layout.world_size // division.layout.pp
        unknown = list(range(pp_rank * ranks_of_stage, (pp_rank + 1) * ranks_of_stage))
        while unknown:
            built = _build_rank(division, unknown[0])
            if not built:
                break  # a pipeline rank whose stages are empty
            for name, held in built.items():
                found[name] = (*found.get(name, ()), held)
            known = set.intersection(*(set(held.regions) for held in set(built.values())))
            unknown = [rank for rank in unknown if rank not in known]
    holders = cache(_holders)
    return {name: holders(held) for kind in (WEIGHTS, OPTIMIZER) for name, held in found.items()
            if name.startswith(kind)}


@dataclass(frozen=True, eq=False)
class _Held:
    """The regions that each rank holds of the tensors that are divided so. Compared by identity, to be shared."""

    regions: dict[int, list[Region]]


def _holders(of_stages: tuple[_Held, ...]) -> Holders:
    """Put together what the ranks of several builds hold of a tensor."""
    found: dict[Region, set[int]] = {}
    for held in of_stages:
        for rank, region in ((rank, region) for rank, own in held.regions.items() for region in own):
            if region.numel:  # a rank may hold nothing of a tensor with few rows
                found.setdefault(region, set()).add(rank)
    return {region: tuple(sorted(ranks)) for region, ranks in found.items()}


@dataclass
class Reads:
    """What one rank reads of a checkpoint.

    `files` are those that it opens, `own` the bytes of its shards, `items` the bytes of the stored items that hold
    them, which DCP's own reader reads whole.
    """

    files: set[str] = field(default_factory=set)
    own: int = 0
    items: int = 0


def reads_of_ranks(found: HoldersByTensor, names: Iterable[str], stored: DcpDirectory) -> dict[int, Reads]:
    """Return what each rank reads of the tensors `names` as they are stored now."""
    reads: dict[int, Reads] = {}
    for name in names:
        for region, ranks in found[name].items():
            items = stored.covering(name, region)
            for each in (reads.setdefault(rank, Reads()) for rank in ranks):
                each.files |= {item.file for item in items}
                each.own += region.numel * stored.dtypes[name].itemsize
                each.items += sum(item.length for item in items)
    return reads


def _build_rank(division: ModelDivision, rank: int) -> dict[str, _Held]:
    """Build `rank`'s stages; return for each of its tensors what the ranks of the tensor's mesh hold."""
    with fake_job(division.layout, rank) as meshes:
        mine = stages_of_rank(meshes.rank("pp"), len(division.stages), division.layout.pp, division.schedule)
        stages = shape_stages(division.model, [division.stages[index] for index in mine], meshes, _SEQ_LENGTH)
        shard_stages(stages, meshes)
        optimizer = torch.optim.AdamW([{"params": [each for stage in stages for each in stage.parameters()]}])
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        tensors = model_state(stages) | optimizer_state(stages, optimizer)
        everyone = meshes.dense.mesh[meshes.rank("pp")].flatten().tolist()
        held = cache(partial(_held, everyone))
        return {name: held(tuple(tensor.shape), *((tensor.device_mesh, tensor.placements)
                                                  if isinstance(tensor, DTensor) else (None, ())))
                for name, tensor in tensors.items()}


def _held(everyone: list[int], shape: tuple[int, ...], mesh: DeviceMesh | None,
          placements: tuple[Placement, ...]) -> _Held:
    """Return what ranks hold of a tensor on `mesh`, or of a buffer without one, which every rank holds whole."""
    if mesh is None:
        return _Held(dict.fromkeys(everyone, [Region((0,) * len(shape), shape)]))
    coordinates = product(*map(range, mesh.shape))
    return _Held({rank: [Region(*region) for region in regions(shape, mesh.shape, coordinate, placements)]
                  for rank, coordinate in zip(mesh.mesh.flatten().tolist(), coordinates)})
