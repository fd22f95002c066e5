"""Which part of every tensor each rank of a layout reads: found by sharding the model as training does.

The stages are built on the meta device in a job of torch's `fake` ranks, so there is no second description of the
shards that could drift from the first. One rank's build says what all ranks of its meshes hold, since a DTensor's
placements depend on the coordinates alone; so a few builds for each pipeline rank are enough.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from megatron_deepseek.checkpoint.dcp.files import DcpDirectory
from megatron_deepseek.checkpoint.job.state import MOMENTS, model_state, optimizer_state
from megatron_deepseek.checkpoint.regions import Region
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import shape_stages, shard_stages
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.parallel.shards import regions
from megatron_deepseek.torch_private import FakeStore

Holders = dict[Region, tuple[int, ...]]  # parts of a tensor and the ranks that hold each, in order
Readers = dict[str, Holders]
_SHORT = 64  # tokens of a sequence, which decide nothing about weights


@dataclass(frozen=True)
class ModelDivision:
    """A job as far as it decides who holds what: its layout, and the stages that its schedule places."""

    model: ModelConfig
    layout: Layout
    stages: tuple[Stage, ...]
    schedule: str


def readers(division: ModelDivision) -> Readers:
    """By name of a saved tensor: the parts that ranks hold, and the ranks that hold each. The model comes first.

    Tensors that are divided alike, as those of equal layers are, share one dictionary: there are hundreds of thousands
    of parts.
    """
    found: dict[str, tuple[_Held, ...]] = {}
    for pp_rank in range(division.layout.pp):
        of_stage = division.layout.world_size // division.layout.pp
        waiting = list(range(pp_rank * of_stage, (pp_rank + 1) * of_stage))
        while waiting:
            placed = _placed(division, waiting[0])
            if not placed:
                break  # a pipeline rank whose stages are empty
            for name, held in placed.items():
                found[name] = (*found.get(name, ()), held)
            known = set.intersection(*(set(held.regions) for held in set(placed.values())))
            waiting = [rank for rank in waiting if rank not in known]
    holders, kinds = cache(_holders), ("model.", "optimizer.")
    return {name: holders(held) for kind in kinds for name, held in found.items() if name.startswith(kind)}


@dataclass(frozen=True, eq=False)
class _Held:
    """The parts that ranks hold of any tensor that is divided so; known by its identity."""

    regions: dict[int, list[Region]]


def _holders(together: tuple[_Held, ...]) -> Holders:
    found: dict[Region, set[int]] = {}
    for held in together:
        for rank, region in ((rank, region) for rank, own in held.regions.items() for region in own):
            if region.numel:  # few rows over many ranks leave some without
                found.setdefault(region, set()).add(rank)
    return {region: tuple(sorted(ranks)) for region, ranks in found.items()}


@dataclass
class Reads:
    """What one rank reads of a checkpoint: from how many files, the bytes of its shards, and of the items that hold
    them, which DCP's own reader reads whole.
    """

    files: set[str] = field(default_factory=set)
    own: int = 0
    items: int = 0


def reads_of_ranks(found: Readers, names: Iterable[str], stored: DcpDirectory) -> dict[int, Reads]:
    """By rank, for the tensors `names` as they are stored now."""
    reads: dict[int, Reads] = {}
    for name in names:
        for region, ranks in found[name].items():
            items = stored.covering(name, region)
            for each in (reads.setdefault(rank, Reads()) for rank in ranks):
                each.files |= {item.file for item in items}
                each.own += region.numel * stored.dtypes[name].itemsize
                each.items += sum(item.length for item in items)
    return reads


def _placed(division: ModelDivision, rank: int) -> dict[str, _Held]:
    """The parts of `rank`'s tensors that the ranks of their meshes hold."""
    with _fake_job(division.layout, rank) as meshes:
        mine = stages_of_rank(meshes.rank("pp"), len(division.stages), division.layout.pp, division.schedule)
        stages = shape_stages(division.model, [division.stages[index] for index in mine], meshes, _SHORT)
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
    """Of a tensor on a mesh, or, without one, of a buffer that every rank of the stage holds whole."""
    if mesh is None:
        return _Held(dict.fromkeys(everyone, [Region((0,) * len(shape), shape)]))
    coordinates = product(*map(range, mesh.shape))
    return _Held({rank: [Region(*region) for region in regions(shape, mesh.shape, coordinate, placements)]
                  for rank, coordinate in zip(mesh.mesh.flatten().tolist(), coordinates)})


@contextmanager
def _fake_job(layout: Layout, rank: int) -> Iterator[Meshes]:
    assert not dist.is_initialized(), "the parts of a layout are worked out outside of jobs"
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield build_meshes(layout, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
