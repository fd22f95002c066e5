"""A checkpoint of adapters: what is in it, its base, and PEFT's files beside it; what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import CPU, LORA, AdapterBench
from small_models import weights_of

from megatron_deepseek.checkpoint.adapter.base import BASE, check_adapters, read_base
from megatron_deepseek.checkpoint.adapter.peft_config import peft_config
from megatron_deepseek.checkpoint.convert.formats import open_native
from megatron_deepseek.checkpoint.dcp.files import open_dcp
from megatron_deepseek.checkpoint.job.adapters import load_adapter, load_with_base
from megatron_deepseek.model.architecture.adapters import LoraSettings, adapter_rows, is_adapter


@pytest.fixture(scope="module")
def bench(tmp_path_factory, meshes) -> AdapterBench:
    return AdapterBench(tmp_path_factory.mktemp("adapters"), meshes)


def test_a_checkpoint_holds_adapters_their_moments_and_router_biases(bench):
    rows = {row.name for row in adapter_rows(bench.config, LORA)}
    expected = {f"{part}{name}" for part in ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.") for name in rows}
    biases = {f"model.model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)}
    assert set(open_dcp(bench.saved).shapes) == expected | biases
    other = bench.new()
    state, base = load_with_base(bench.saved, other.stages, other.optimizer, CPU)
    assert state.iteration == 1 and base == bench.base
    ours, theirs = weights_of(other.stages[0]), weights_of(bench.trainer.stages[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all((moments["exp_avg"].to_local() == 0.25).all() for moments in other.optimizer.state.values())


def test_another_base_is_noticed(bench, tmp_path):
    """One number of one weight is another one."""
    saved = tmp_path / "save"
    shutil.copytree(bench.saved, saved)
    moved = tmp_path / "hf"
    shutil.copytree(bench.released, moved)
    file = sorted(moved.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith("o_proj.weight"))[3, 5] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    (saved / BASE).write_text(json.dumps(json.loads((saved / BASE).read_text()) | {"directory": str(moved)}))
    with pytest.raises(ValueError, match="of another base"):
        load_with_base(saved, bench.new().stages, None, CPU)


def test_what_is_not_the_same_adapter(bench):
    for lora, message in ((None, "of rank 2 alone"), (LoraSettings(4, 3.0, LORA.lora_target), "--lora-rank 2"),
                          (LoraSettings(2, 2.0, LORA.lora_target), "--lora-alpha 3.0"),
                          (LoraSettings(2, 3.0), "--lora-target all router mtp, this run has all"),
                          (LoraSettings(2, 3.0, LORA.lora_target, True), "--lora-rs False")):
        with pytest.raises(ValueError, match=message):
            check_adapters(bench.saved, lora)
    check_adapters(bench.saved, LORA)
    check_adapters(bench.released, None)


def test_what_reads_whole_models_says_the_way(bench):
    with pytest.raises(ValueError, match=f"merge_lora.py --base {bench.released} --adapter"):
        open_native(bench.root / "save", without_mtp=False)


def test_pefts_files_and_back(bench):
    """Names of PEFT, of each expert alone, MTP's in a file of their own; loading them gives the same numbers."""
    weights = load_file(bench.saved / "adapter" / "adapter_model.safetensors")
    mtp = load_file(bench.saved / "adapter" / "adapter_model_mtp.safetensors")
    assert not any(".layers.2." in name for name in weights) and all(".layers.2." in name for name in mtp)
    ours = weights_of(bench.trainer.stages[0], torch.float32)
    prefix = "base_model.model.model.layers.1.mlp"
    width, stacked = bench.config.moe_intermediate_size, ours["model.layers.1.mlp.experts.gate_up_proj_lora_A"]
    assert torch.equal(weights[f"{prefix}.experts.3.up_proj.lora_A.weight"], stacked[3, 2:])
    assert torch.equal(weights[f"{prefix}.experts.3.up_proj.lora_B.weight"],
                       ours["model.layers.1.mlp.experts.gate_up_proj_lora_B"][3, width:])
    assert torch.equal(weights[f"{prefix}.gate.lora_B.weight"], ours["model.layers.1.mlp.gate.lora_B.weight"])
    other = bench.new()
    load_adapter(bench.saved / "adapter", other.stages, bench.config, LORA)
    found = weights_of(other.stages[0], torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.items() if is_adapter(name))


@pytest.mark.parametrize("lora, message", [
    (LoraSettings(2, 3.0, ("all", "mtp")), "layers that --lora-target all mtp does not name"),
    (LoraSettings(2, 6.0, LORA.lora_target), "has scale 1.5"),
    (LoraSettings(4, 6.0, LORA.lora_target), "has rank 2 for")])
def test_adapters_of_peft_that_a_run_cannot_take(bench, lora, message):
    with pytest.raises(ValueError, match=f"--load-adapter .*{message}"):
        load_adapter(bench.saved / "adapter", bench.new(lora).stages, bench.config, lora)


def test_an_adapter_that_lacks_a_layer(bench, tmp_path):
    shutil.copytree(bench.saved / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model_mtp.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks 22 layers .* first model.layers.2.eh_proj"):
        load_adapter(tmp_path / "adapter", bench.new().stages, bench.config, LORA)


@pytest.mark.parametrize("targets, expected", [(("attention",), 0.25), (("attention", "experts"), 0.0)])
def test_dropout_in_the_configs(bench, targets, expected):
    """PEFT refuses one on parameters; base.json has the run's, and those of older versions none."""
    lora = LoraSettings(2, 3.0, targets, lora_dropout=0.25)
    assert peft_config(bench.config, lora, "base")["lora_dropout"] == expected
    path, note = bench.root / BASE, bench.base.note(lora)
    path.write_text(json.dumps(note))
    assert read_base(bench.root) == (bench.base, lora)
    path.write_text(json.dumps({name: value for name, value in note.items() if name != "lora_dropout"}))
    assert read_base(bench.root)[1].lora_dropout == 0.0


def test_adapter_config(bench):
    """MLA's layers are modules, all others parameters; rank and alpha of fused gate and up are double."""
    made = peft_config(bench.config, LORA, "base")
    assert set(made["target_modules"]) == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {"mlp.experts.gate_up_proj", "mlp.gate.weight", "mlp.up_proj.weight",
            "mlp.shared_experts.down_proj.weight"} <= set(made["target_parameters"])
    assert made["rank_pattern"] == {"experts.gate_up_proj": 4} and made["alpha_pattern"] == {"experts.gate_up_proj": 6}
    stabilised = peft_config(bench.config, LoraSettings(2, 3.0, ("experts",), True), "base")
    assert stabilised["alpha_pattern"]["experts.gate_up_proj"] / 4**0.5 == pytest.approx(3.0 / 2**0.5)
    some = peft_config(bench.config, LoraSettings(2, 3.0, ("layers.1.self_attn.o_proj",)), "base")
    assert some["target_modules"] == ["model.layers.1.self_attn.o_proj"] and some["target_parameters"] is None
