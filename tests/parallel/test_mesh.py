"""Meshes, stages and shards far beyond the machine, without devices: torch's fake process groups, the meta device."""

import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.presets import V3
from megatron_deepseek.model.build import Precision, default_dtype, make_blueprint, units
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel import exchange
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.data import shard_over_data
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.shards import shard_regions
from megatron_deepseek.planning.pipeline_balance import stages
from megatron_deepseek.training.trainer import TrainingSpec, travel_between_stages

LAYOUTS = (
    Layout(dp=2, pp=2, tp=2, ep=4),
    Layout(dp=3, pp=2, tp=4, ep=6),
    Layout(dp=4, pp=3, tp=2, cp=2, ep=2, etp=2),
    Layout(dp=8, tp=1, ep=8),
    Layout(pp=4, tp=4, ep=2),
    Layout(dp=2, pp=2, tp=2, cp=4, ep=4, etp=4),
)
V3_LAYOUTS = {
    "PP16 x EP64": Layout(dp=128, pp=16, ep=64),
    "PP16 x CP8 x TP8 x EP64": Layout(dp=2, pp=16, cp=8, tp=8, ep=64, sequence_parallel=True),
    "PP16 x EP32 x ETP2": Layout(dp=128, pp=16, ep=32, etp=2),
    "TP8 x EP64": Layout(dp=256, tp=8, ep=64, sequence_parallel=True),
}
LONG = 131072  # tokens of a sequence that CP8 is for


def fake_meshes(layout: Layout, rank: int) -> Meshes:
    """The meshes of `rank`. The test runs in a rank process of its own, whose gloo group makes way."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size)
    return build_meshes(layout, torch.device("cpu"))


def groups_of(mesh, *axes: str) -> list[list[int]]:
    """Every group of ranks along `axes` of a mesh, in Megatron's order: sorted by first rank."""
    dims = [mesh.mesh_dim_names.index(axis) for axis in axes]
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    size = math.prod(mesh.mesh.shape[dim] for dim in dims)
    return sorted(mesh.mesh.permute(*others, *dims).reshape(-1, size).tolist())


def group_tables(layout: Layout) -> dict[str, list[list[int]]]:
    """Megatron's name of each kind of group -> our groups; and that this rank's process groups are among them."""
    meshes = fake_meshes(layout, rank=layout.world_size - 1)
    tables = {axis: groups_of(meshes.dense, axis) for axis in ("tp", "cp", "dp", "pp")}
    tables |= {"dp-cp": groups_of(meshes.dense, "dp", "cp"), "tp-dp-cp": groups_of(meshes.dense, "dp", "cp", "tp")}
    tables |= {"expert " + name: groups_of(meshes.expert, axis)
               for name, axis in (("tp", "etp"), ("ep", "ep"), ("dp", "edp"), ("pp", "pp"))}
    own = {"tp": meshes.tp, "expert ep": meshes.ep, "expert dp": meshes.expert_fsdp, "dp-cp": meshes.dense_fsdp,
           "tp-dp-cp": meshes.stage}
    for name, mesh in own.items():
        assert dist.get_process_group_ranks(mesh.get_group()) in tables[name], name
    return tables


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_are_grouped_as_megatron_groups_them(ranks, layout):
    generator = pytest.importorskip("megatron.core.parallel_state").RankGenerator
    order = "tp-cp-ep-dp-pp"
    dense = generator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert = generator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=order)
    (tables,) = ranks.run(1, group_tables, layout)
    for name, groups in tables.items():
        theirs = expert.get_ranks(name.removeprefix("expert ")) if name.startswith("expert ") else dense.get_ranks(name)
        assert groups == sorted(theirs), name


def meta_stage(model: ModelConfig, layout: Layout, pp_rank: int, stage_rank: int) -> DeepseekStage:
    """The stage of pipeline rank `pp_rank` as its rank number `stage_rank` holds it: shards without memory."""
    meshes = fake_meshes(layout, pp_rank * (layout.world_size // layout.pp) + stage_rank)
    stage = stages(model, layout.pp)[pp_rank]
    with torch.device("meta"), default_dtype(torch.float32):
        module = DeepseekStage(stage, make_blueprint(model, meshes), 64,
                               meshes.device)
    shard_over_data(units(module, meshes, Precision(torch.float32, torch.bfloat16)), reshard_after_forward=False)
    return module


def check_stages(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Build every stage, check that its parameters are covered, and return their names and shapes."""
    shapes, checked = {}, set()
    for pp_rank in range(layout.pp):
        module = meta_stage(V3, layout, pp_rank, stage_rank=(37 * pp_rank + 5) % (layout.world_size // layout.pp))
        for name, parameter in module.named_parameters():
            shapes[name] = tuple(parameter.shape)
            kind = tuple(parameter.shape), parameter.device_mesh.shape, str(parameter.placements)
            if kind not in checked:
                check_coverage(name, parameter)
            checked.add(kind)
    return shapes


def check_coverage(name: str, parameter) -> None:
    """The slices of all ranks of the mesh paint every element, as often as the placements say it is replicated.

    Slices are regions: painting the cells between their edges is painting the elements.
    """
    mesh, placements, shape = parameter.device_mesh, parameter.placements, tuple(parameter.shape)
    held = {coordinate: regions(shape, mesh.shape, coordinate, placements)
            for coordinate in product(*map(range, mesh.shape))}
    every = [region for regions in held.values() for region in regions]
    edges = [sorted({edge for b in every for edge in b[dim]} | {0, size}) for dim, size in enumerate(shape)]
    painted = torch.zeros([len(edge) - 1 for edge in edges], dtype=torch.int64)
    for b in every:
        painted[tuple(slice(edge.index(start), edge.index(stop)) for edge, (start, stop) in zip(edges, b))] += 1
    copies = math.prod(n for n, placement in zip(mesh.shape, placements) if isinstance(placement, Replicate))
    assert (painted == copies).all(), (name, mesh, placements)
    check_pieces(name, parameter, held[tuple(mesh.get_coordinate())])


def regions(shape, mesh_shape, coordinate, placements) -> list[list[tuple[int, int]]]:
    """What a rank holds: one region, or one of each of the matrices stacked and divided in a dimension but 0."""
    stacked = next((placement for parts, placement in zip(mesh_shape, placements)
                    if parts > 1 and isinstance(placement, _StridedShard) and placement.dim > 0), None)
    if stacked is None:
        return [region(shape, mesh_shape, coordinate, placements)]
    dim, number = stacked.dim, stacked.split_factor
    rows = shape[dim] // number
    first = region((*shape[:dim], rows, *shape[dim + 1:]), mesh_shape, coordinate, placements)
    return [[*first[:dim], tuple(edge + matrix * rows for edge in first[dim]), *first[dim + 1:]]
            for matrix in range(number)]


def region(shape, mesh_shape, coordinate, placements) -> list[tuple[int, int]]:
    """[start, stop) in each dimension. The last axis cuts first, then those before it what is left, as chunk does.

    By hand, since torch's function lists every index of a dimension that is cut twice: minutes for 2,048 ranks.
    """
    bounds = [(0, size) for size in shape]
    for parts, index, placement in reversed([*zip(mesh_shape, coordinate, placements)]):
        if isinstance(placement, Replicate):
            continue
        start, stop = bounds[placement.dim]
        chunk = math.ceil((stop - start) / parts)
        start = min(start + index * chunk, stop)
        bounds[placement.dim] = start, min(start + chunk, stop)
    return bounds


def check_pieces(name: str, parameter, expected: list[list[tuple[int, int]]]) -> None:
    """That the rank that this is takes itself to hold just that, in tensors of those shapes."""
    for piece, box_ in zip(shard_regions(parameter), expected, strict=True):
        assert tuple(piece.local.shape) == tuple(stop - start for start, stop in box_), name
        assert not piece.local.numel() or piece.offset == tuple(start for start, _ in box_), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", V3_LAYOUTS.values(), ids=V3_LAYOUTS)
def test_deepseek_v3_on_2048_ranks(ranks, layout):
    """All 671B parameters and those of the MTP module are there, each in as many slices as ranks that share it."""
    assert layout.world_size == 2048
    (shapes,) = ranks.run(1, check_stages, layout)
    assert sum(map(math.prod, shapes.values())) == V3.num_parameters()
    assert len([name for name in shapes if name.endswith("experts.down_proj")]) == V3.num_moe_layers + 1


@dataclass(frozen=True)
class ContextRank:
    """What a rank has of a sequence, and which global ranks it sends blocks to and receives them from."""

    rank: int
    positions: torch.Tensor
    sends_to: int
    receives_from: int
    pairs: int
    packed_pairs: int
    passed_on: tuple[int, ...]


def packed_row() -> torch.Tensor:
    """[1, LONG]: documents of 1 to 40,000 tokens."""
    starts = torch.rand(LONG, generator=torch.Generator().manual_seed(0)) < 1e-4
    starts[torch.tensor([1, 17, 8192, 16384, 65536])] = True
    return starts.long().cumsum(0).unsqueeze(0)


def context_ranks(layout: Layout, line: int) -> list[ContextRank]:
    """Every member of one context-parallel group, that of the ranks at `line` of a stage's data ranks."""
    found, transfers = [], []
    exchange.dist.batch_isend_irecv = lambda ops: transfers.append(ops) or []
    for cp_rank in range(layout.cp):
        meshes = fake_meshes(layout, (line * layout.cp + cp_rank) * layout.tp)
        cp = ContextParallel(meshes.cp)
        next(exchange.Ring(meshes.cp.get_group()).blocks(torch.zeros(1)))
        send, receive = transfers.pop()
        assert (send.op, receive.op) == (dist.isend, dist.irecv)
        spec = TrainingSpec(V3, stages(V3, layout.pp), "1F1B", LONG, micro_batch_size=1)
        shape = tuple(travel_between_stages(spec, meshes).passed_on(0, 1).shape)
        pairs = [sum(map(pairs_of_part, cp.block_mask(LONG, documents).of(owner)[1]))
                 for documents in (None, Documents.find(packed_row())) for owner in range(cp.size)]
        found.append(ContextRank(dist.get_rank(), cp.positions(LONG), send.peer, receive.peer, sum(pairs[:cp.size]),
                                 sum(pairs[cp.size:]), shape))
    return found


def pairs_of_part(part) -> int:
    rows, keys = part.rows.stop - part.rows.start, part.keys.stop - part.keys.start
    return rows * (rows + 1) // 2 if part.causal else rows * keys


@pytest.mark.parametrize("layout, line", [
    (Layout(dp=16, pp=16, cp=8, ep=64), 5), (V3_LAYOUTS["PP16 x CP8 x TP8 x EP64"], 1)], ids=["CP8", "CP8 x TP8"])
def test_128k_tokens_over_8_context_ranks(ranks, layout, line):
    """Each token and each causal pair once, as many pairs for each rank, and one ring through the whole group."""
    (found,) = ranks.run(1, context_ranks, layout, line)
    assert torch.equal(torch.cat([each.positions for each in found]).sort().values, torch.arange(LONG))
    chunk = LONG // 16
    for cp_rank, each in enumerate(found):
        assert sorted({*(each.positions // chunk).tolist()}) == [cp_rank, 15 - cp_rank]
        assert each.passed_on == (1, LONG // 8 // layout.tp, V3.hidden_size)
    assert {each.pairs for each in found} == {LONG * (LONG + 1) // 2 // 8}
    lengths = packed_row().unique_consecutive(return_counts=True)[1]
    assert sum(each.packed_pairs for each in found) == (lengths * (lengths + 1) // 2).sum()
    members = [each.rank for each in found]
    assert members == [line * layout.cp * layout.tp + layout.tp * i for i in range(8)]
    assert [each.sends_to for each in found] == members[1:] + members[:1]
    assert [each.receives_from for each in found] == members[-1:] + members[:-1]
