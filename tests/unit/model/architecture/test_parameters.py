"""The table of parameters against the model that is built, on the meta device and on faked ranks, and transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from small_models import LLAMA_SMALL, V2_SMALL, V3_SMALL, whole_stage
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import (
    BIAS,
    EMBEDDING,
    FLOAT32,
    HEAD,
    MATRIX,
    UNTRAINED,
    VECTOR,
    Parameter,
    hf_tensors,
    layer_rows,
    parameters,
)
from megatron_deepseek.model.architecture.placements import EP, ETP, TP, Division, Placement, key_value_rows
from megatron_deepseek.model.architecture.presets import TINY, V3
from megatron_deepseek.model.build import shape_stages
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.shards import stacked_shard
from megatron_deepseek.torch_private import FakeStore

LITE_SMALL = replace(V2_SMALL, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)
CONFIGS = {
    "V2-Lite": LITE_SMALL,
    "V2": replace(V2_SMALL, q_lora_rank=10),
    "V3": replace(V3_SMALL, num_nextn_predict_layers=1),
    "bias": replace(V3_SMALL, attention_bias=True),
    "bias, no q-LoRA": replace(LITE_SMALL, attention_bias=True),
    "tied, two MTP": replace(V3_SMALL, tie_word_embeddings=True, num_nextn_predict_layers=2),
    "two shared experts": replace(V3_SMALL, n_shared_experts=2),
    "no shared expert": replace(V3_SMALL, n_shared_experts=0),
    "dense, MTP": replace(V2_SMALL, n_routed_experts=0, num_nextn_predict_layers=1),
    "grouped-query": LLAMA_SMALL,
    "one head of keys, biases": replace(LLAMA_SMALL, num_key_value_heads=1, attention_bias=True, head_dim=6),
    "Qwen2, tied, MTP": replace(LLAMA_SMALL, num_key_value_heads=1, qkv_bias=True, tie_word_embeddings=True,
                                num_nextn_predict_layers=1),
    "Qwen3": replace(LLAMA_SMALL, qk_norm=True, attention_bias=True),
    "DeepSeekMoE": replace(LLAMA_SMALL, num_key_value_heads=4, moe_intermediate_size=12, n_routed_experts=8,
                           n_shared_experts=2, num_experts_per_tok=3, first_k_dense_replace=1),
    "every other layer": replace(V2_SMALL, moe_layer_freq=2, num_hidden_layers=4, first_k_dense_replace=0),
}
LAYOUTS = {
    "one rank": Layout(),
    "TP2": Layout(tp=2),
    "EP4": Layout(dp=4, ep=4),
    "TP2 x EP2 x ETP2": Layout(dp=2, tp=2, ep=2, etp=2, sequence_parallel=True),
    "CP2 x TP2 x ETP4": Layout(cp=2, tp=2, etp=4),
}


@dataclass(frozen=True)
class Built:
    """What one rank has of a parameter or buffer. `placements` are by axis; none on a mesh of one rank."""

    shape: tuple[int, ...]
    local: tuple[int, ...]
    placements: dict
    mesh: tuple[str, ...]
    trained: bool
    dtype: torch.dtype


@contextmanager
def fake_meshes(layout: Layout, rank: int) -> Iterator[Meshes]:
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield build_meshes(layout, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def built(config: ModelConfig, layout: Layout = Layout(), rank: int = 0) -> dict[str, Built]:
    """Return all that the model has on `rank`, by name."""
    with fake_meshes(layout, rank) as meshes:
        (stage,) = shape_stages(config, [whole_stage(config)], meshes, 8)
        trained = {name: parameter.requires_grad for name, parameter in stage.named_parameters()}
        found = {}
        for name, tensor in stage.state_dict(keep_vars=True).items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            axes = tensor.device_mesh.mesh_dim_names if isinstance(tensor, DTensor) else ()
            placements = dict(zip(axes, tensor.placements)) if axes else {}
            found[name] = Built(tuple(tensor.shape), tuple(local.shape), placements, axes, trained.get(name, False),
                                tensor.dtype)
        return found


def as_dtensor(division: Division):
    return Shard(division.dim) if division.matrices == 1 else stacked_shard(division.dim, division.matrices)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_the_model(name):
    """Every parameter and buffer and nothing else: its shape, its dtype, and whether it is trained."""
    rows = {row.name: row for row in parameters(CONFIGS[name])}
    model = built(CONFIGS[name])
    assert rows.keys() == model.keys()
    for name, tensor in model.items():
        assert (rows[name].shape, rows[name].trained) == (tensor.shape, tensor.trained), name
        assert tensor.dtype == torch.float32
        assert (rows[name].group == UNTRAINED) == (not tensor.trained) == (rows[name].dtype == FLOAT32), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_what_ranks_hold(name, layout):
    """The local shape and the placement on each axis of every parameter, on the first and the last rank."""
    ranks = {TP: layout.tp, EP: layout.ep, ETP: layout.etp}
    for rank in {0, layout.world_size - 1}:
        model = built(CONFIGS[name], layout, rank)
        for row in parameters(CONFIGS[name]):
            tensor = model[row.name]
            assert tensor.local == row.placement.local_shape(row.shape, ranks), row
            assert row.size == row.placement.parts(ranks) * torch.Size(tensor.local).numel(), row
            if not tensor.mesh:  # one rank, or the router's bias, which is no DTensor
                assert tensor.local == row.shape, row
                continue
            assert tensor.mesh == ((EP, ETP) if row.mesh == "expert" else (TP,)), row
            divided = {division.axis: as_dtensor(division) for division in row.placement.divisions
                       if division.parts(ranks[division.axis]) == ranks[division.axis]}
            assert tensor.placements == {axis: divided.get(axis, Replicate()) for axis in tensor.mesh}, row


def test_heads_of_keys_are_divided_or_repeated():
    """By hand: of 4 heads of 8 rows 2 ranks have 2 each; 8 ranks have all of them; 3 and 6 ranks have no way."""
    placement = key_value_rows(4)
    assert [placement.local_shape((32, 5), {TP: ranks})[0] for ranks in (1, 2, 4, 8, 12)] == [32, 16, 8, 32, 32]
    assert [placement.parts({TP: ranks}) for ranks in (1, 2, 4, 8)] == [1, 2, 4, 1]
    for ranks in (3, 6):
        with pytest.raises(ValueError, match=rf"not a multiple of the {ranks} ranks|4 heads .* the {ranks} ranks"):
            placement.local_shape((36, 5), {TP: ranks})


def test_what_ranks_do_not_divide_is_refused():
    placement = Placement("rows", (Division(TP, 0),))
    with pytest.raises(ValueError, match=r"dimension 0 of a weight of shape \(6, 4\) is not a multiple of the 4 ranks"):
        placement.local_shape((6, 4), {TP: 4})


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": 2},
                                     {"tie_word_embeddings": True}, {"first_k_dense_replace": 3},
                                     {"attention_bias": True, "q_lora_rank": None}])
def test_hugging_faces_tensors_are_those_of_transformers(changes):
    """Names, shapes and numbers of elements; its experts are stacked as ours are, so ours are taken apart one by one.

    It has no MTP modules.
    """
    transformers = pytest.importorskip("transformers")
    model = replace(TINY, num_nextn_predict_layers=0, **changes)
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**model.to_hf_dict())).state_dict()
    if model.tie_word_embeddings:
        theirs.pop(HEAD, None)
    assert {row.name: row.shape for row in parameters(model)} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_faces_tensors_fill_every_parameter_once(name):
    """In the order of the layers, the experts of one after the other, gate before up before down."""
    covered = {row.name: torch.zeros(row.shape) for row in parameters(CONFIGS[name])}
    names = []
    for row, tensor in hf_tensors(CONFIGS[name]):
        extent = (1,) * (len(row.shape) - len(tensor.shape)) + tensor.shape
        covered[row.name][tuple(slice(at, at + size) for at, size in zip(tensor.offset, extent))] += 1
        names.append(tensor.name)
    assert all((count == 1).all() for count in covered.values())
    experts = [name for name in names if ".mlp.experts." in name]
    assert experts == sorted(experts, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    assert [name.split(".")[6] for name in experts] == ["gate_proj", "up_proj", "down_proj"] * (len(experts) // 3)


def test_a_row_by_hand():
    """Expert weights of V3's layer 7: 256 experts, gate and up of 2,048 rows each, 8 of them for a token."""
    rows = {row.name: row for row in layer_rows(V3, 7)}
    row = rows["model.layers.7.mlp.experts.gate_up_proj"]
    assert (row.shape, row.mesh, row.group, row.gemms) == ((256, 4096, 7168), "expert", MATRIX, 1)
    assert row.active == 8 * 4096 * 7168
    assert row.placement.local_shape(row.shape, {EP: 64, ETP: 2}) == (4, 2048, 7168)
    up = [*row.hf_tensors(expert=3)][1]
    assert (up.name, up.shape, up.offset) == ("model.layers.7.mlp.experts.3.up_proj.weight", (2048, 7168), (3, 2048, 0))
    bias = rows[f"model.layers.7.mlp.gate.{BIAS}"]
    assert (bias.dtype, bias.trained, bias.group, bias.gemms, bias.active) == (FLOAT32, False, UNTRAINED, 0, 0)
    norm = rows["model.layers.7.input_layernorm.weight"]
    assert (norm.group, norm.gemms, norm.active, norm.placement.divisions) == (VECTOR, 0, 7168, ())


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_multiplies_once_for_each_prediction(tied):
    """An embedding that only looks up multiplies nothing; one that is the head too is it."""
    config = replace(V3_SMALL, tie_word_embeddings=tied, num_nextn_predict_layers=2)
    rows: dict[str, Parameter] = {row.name: row for row in parameters(config)}
    head = rows[EMBEDDING if tied else HEAD]
    assert (head.gemms, head.active) == (3, config.vocab_size * config.hidden_size)
    assert (HEAD in rows) == (not tied)
    assert tied or (rows[EMBEDDING].gemms, rows[EMBEDDING].active) == (0, 0)
