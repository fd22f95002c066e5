"""--save-hf of a run that is started again after its end: an export of that very checkpoint is what is asked for."""

import json
from dataclasses import replace

import pytest
import torch
from native_checkpoints import MODEL, random_state, write_native
from small_checkpoints import all_tensors

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.assets import Assets, write_native_assets
from megatron_deepseek.checkpoint.job.export import check_export, export_hf, is_exported
from megatron_deepseek.settings import RunSettings


@pytest.fixture
def exported(tmp_path) -> RunSettings:
    """A run with its export."""
    write_native(tmp_path / "run", random_state())
    run = RunSettings(100, save=tmp_path / "run", save_hf=tmp_path / "hf")
    export_hf(run, 0, 1)
    return run


def test_the_same_checkpoint_in_the_same_numbers(exported, tmp_path):
    """Not another iteration, dtype or content of the same name."""
    checkpoint = exported.save / "iter_0000100"
    assert is_exported(exported, checkpoint)
    assert not is_exported(replace(exported, bf16=True), checkpoint)
    assert not is_exported(replace(exported, save_hf_dtype="fp8"), checkpoint)
    write_native(tmp_path / "other", random_state(seed=1))
    assert not is_exported(exported, tmp_path / "other" / "iter_0000100")
    write_native(exported.save, random_state(), iteration=200)
    assert not is_exported(exported, exported.save / "iter_0000200")


def test_it_is_no_obstacle_once_the_run_is_finished(exported, tmp_path):
    checkpoint = exported.save / "iter_0000100"
    check_export(exported, MODEL, finished=checkpoint)
    for finished, bf16 in ((None, False), (checkpoint, True)):
        with pytest.raises(ValueError, match=f"--save-hf {exported.save_hf} exists already"):
            check_export(replace(exported, bf16=bf16), MODEL, finished=finished)
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "model.safetensors.index.json").write_text("[")
    with pytest.raises(ValueError, match="exists already"):
        check_export(replace(exported, save_hf=tmp_path / "another"), MODEL, finished=checkpoint)
    check_export(replace(exported, save_hf=tmp_path / "nothing"), MODEL, finished=checkpoint)


def test_without_checksums_nobody_knows(exported):
    (exported.save / "iter_0000100" / "checksums.json").unlink()
    assert not is_exported(exported, exported.save / "iter_0000100")


@pytest.mark.parametrize("asked, came", [("ue8m0", None), (None, "ue8m0"), (None, None), ("float32", "ue8m0")])
def test_fp8_weights_and_their_scales(tmp_path, asked, came):
    """Powers of two where they are asked for, or where the weights that the run began from had them (V3.1)."""
    weights = random_state()
    write_native(tmp_path / "run", weights)
    quantized = block_fp8.QUANTIZATION_CONFIG | ({"scale_fmt": came} if came else {})
    fields = MODEL.to_hf_dict() | {"quantization_config": quantized}
    write_native_assets(tmp_path / "run" / "huggingface", Assets(fields=fields), MODEL)
    run = RunSettings(100, save=tmp_path / "run", save_hf=tmp_path / "hf", save_hf_dtype="fp8", fp8_scale_format=asked)
    export_hf(run, 0, 1)
    assert is_exported(run, run.save / "iter_0000100") and not is_exported(
        replace(run, fp8_scale_format="float32" if asked != "float32" else None), run.save / "iter_0000100")
    stored = all_tensors(tmp_path / "hf")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn and stored["model.norm.weight"].dtype == torch.bfloat16
    powers = (asked or came) == "ue8m0"
    assert (torch.frexp(stored[f"{name}_scale_inv"]).mantissa == 0.5).all() == powers
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["quantization_config"].get("scale_fmt") == ("ue8m0" if powers else None)
