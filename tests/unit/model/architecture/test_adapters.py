"""The rows of adapters against the model that is built, on faked ranks; what targets name, and what they do not."""

from dataclasses import replace

import pytest
from small_models import LLAMA_SMALL, V3_SMALL, whole_stage
from test_parameters import LAYOUTS, as_dtensor, fake_meshes
from torch.distributed.tensor import DTensor, Replicate

from megatron_deepseek.model.architecture.adapters import (
    LoraSettings,
    adapted_rows,
    adapter_rows,
    describe_adapters,
    factor_of,
    is_adapter,
    matches_nothing,
)
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.model.architecture.presets import V3, V2_LITE
from megatron_deepseek.model.build import BuildOptions, shape_stages

EVERYTHING = ("all", "router", "mtp")
CONFIGS = {"V3": replace(V3_SMALL, num_nextn_predict_layers=1),
           "one head of keys, biases": replace(LLAMA_SMALL, num_key_value_heads=1, attention_bias=True, head_dim=8)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_rows_are_what_ranks_hold(name, layout):
    config, lora = CONFIGS[name], LoraSettings(2, 4.0, EVERYTHING)
    if not config.n_routed_experts and layout.ep * layout.etp > 1:
        pytest.skip("no experts")
    rows = {row.name: row for row in adapter_rows(config, lora)}
    sizes = {TP: layout.tp, EP: layout.ep, ETP: layout.etp}
    with fake_meshes(layout, layout.world_size - 1) as meshes:
        (stage,) = shape_stages(config, [whole_stage(config)], meshes, 8, BuildOptions(lora=lora))
        built = {name: parameter for name, parameter in stage.named_parameters() if is_adapter(name)}
        assert built.keys() == rows.keys()
        for name, parameter in built.items():
            row, local = rows[name], parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert tuple(parameter.shape) == row.shape
            assert tuple(local.shape) == row.placement.local_shape(row.shape, sizes), name
            if isinstance(parameter, DTensor):
                found = dict(zip(parameter.device_mesh.mesh_dim_names, parameter.placements))
                wanted = {each.axis: as_dtensor(each) for each in row.placement.divisions
                          if each.parts(sizes[each.axis]) > 1 or not each.pieces}
                assert found == {axis: wanted.get(axis, Replicate()) for axis in found}, name


def test_sizes_of_the_released_models():
    """Parameters of rank 8, by hand from the shapes: facts that others publish too."""
    def size(config, *targets: str) -> int:
        return sum(row.size for row in adapter_rows(config, LoraSettings(8, 16.0, targets)))

    assert size(V3, "attention") == 61 * 8 * (7168 + 1536 + 1536 + 128 * 192 + 7168 + 576 + 512 + 128 * 256
                                              + 128 * 128 + 7168)
    assert size(V3, "experts") == 58 * 256 * 3 * 8 * (7168 + 2048)
    assert size(V3, "router") == 58 * 8 * (7168 + 256)
    assert size(V3, "mlp") == 3 * 8 * (3 * (7168 + 18432) + 58 * (7168 + 2048))
    assert size(V2_LITE, "experts") == 26 * 64 * 3 * 8 * (2048 + 1408)
    assert size(V3, "all") == size(V3, "attention") + size(V3, "mlp") + size(V3, "experts")


def names(config, *targets: str) -> set[str]:
    return {row.name for row in adapted_rows(config, LoraSettings(1, 1.0, targets))}


def test_what_targets_name():
    """A name is the end of a layer's name, or a wildcard of all of it; experts have those of their projections."""
    config = replace(V3_SMALL, num_nextn_predict_layers=1)
    assert names(config, "q_b_proj") == {f"model.layers.{n}.self_attn.q_b_proj.weight" for n in range(3)}
    assert names(config, "shared_experts.up_proj") == {
        f"model.layers.{n}.mlp.shared_experts.up_proj.weight" for n in (1, 2)}
    assert "model.layers.1.mlp.experts.gate_up_proj" in names(config, "gate_proj") & names(config, "experts.up_proj")
    assert names(config, "model.layers.1.*") == {name for name in names(config, *EVERYTHING) if ".1." in name}
    assert not [name for name in names(config, "all", "router") if ".2." in name]
    assert names(config, "mtp") >= {"model.layers.2.eh_proj.weight", "model.layers.2.mlp.gate.weight"}


@pytest.mark.parametrize("config, target, near", [
    (V3_SMALL, "q_proj", "it has q_b_proj"), (V3_SMALL, "embed_tokens", "matches no linear layer"),
    (V3_SMALL, "mtp", "matches no linear layer"), (LLAMA_SMALL, "experts", "matches no linear layer"),
    (V3_SMALL, "model.layers.2.*", "matches no linear layer"), (V3_SMALL, "atention", "it has attention")])
def test_targets_that_match_nothing(config, target, near):
    assert near in matches_nothing(config, ["all", target])
    assert matches_nothing(config, ["all"]) is None


def test_names_and_scale():
    assert (LoraSettings(4, 8.0).scale, LoraSettings(4, 8.0, lora_rs=True).scale) == (2.0, 4.0)
    assert factor_of("model.layers.1.mlp.experts.gate_up_proj_lora_A") == "lora_A"
    assert factor_of("model.layers.1.self_attn.o_proj.lora_B.weight") == "lora_B"
    assert not is_adapter("model.layers.1.self_attn.o_proj.weight") and not is_adapter("lm_head.weight")
    assert "rank 8, scale 2, on self_attn.q_b_proj" in describe_adapters(V3, LoraSettings(8, 16.0, ("q_b_proj",)))
