"""Conversion between Hugging Face's form and native checkpoints: what goes in comes out, bit for bit."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_checkpoints import (
    V3_WIDE,
    all_tensors,
    assert_identical,
    convert,
    random_weights,
    v3_directory,
    write_hf,
)
from small_models import V2_SMALL, V3_SMALL

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.assets import read_assets, write_config
from megatron_deepseek.checkpoint.convert.blocks import row_ranges
from megatron_deepseek.checkpoint.convert.names import hf_shapes, mtp_copies, native_places
from megatron_deepseek.checkpoint.integrity import verify_directory
from megatron_deepseek.checkpoint.job.distributed import model_state
from megatron_deepseek.checkpoint.loadable import check_checkpoint
from megatron_deepseek.cli.convert_checkpoint import main
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling
from megatron_deepseek.model.build import build_stages
from megatron_deepseek.parallel.layout_string import Stage

CONFIGS = {
    "v3": V3_WIDE,
    "v2": V2_SMALL,
    "no q-LoRA, bias": replace(V3_SMALL, q_lora_rank=None, attention_bias=True, n_shared_experts=2),
    "tied, two MTP": replace(V3_SMALL, tie_word_embeddings=True, num_nextn_predict_layers=2),
    "dense": replace(V2_SMALL, n_routed_experts=0),
    "every other layer": replace(V2_SMALL, moe_layer_freq=2, num_hidden_layers=4, first_k_dense_replace=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_the_model(meshes, name):
    """Every parameter and buffer of the model, and nothing else, has its places, which cover it exactly once."""
    config = CONFIGS[name]
    whole = Stage(True, tuple(range(config.num_hidden_layers)), tuple(range(config.num_nextn_predict_layers)), True)
    stages = build_stages(config, [whole], meshes, 8)
    expected = {name: tuple(tensor.shape) for name, tensor in model_state(stages).items()}
    places = native_places(config)
    assert {f"model.{place.whole}": place.whole_shape for place in places} == expected
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in expected.items()}
    for place in places:
        offset, size = place.rows(0, place.shape[0])
        covered[f"model.{place.whole}"][tuple(slice(a, a + n) for a, n in zip(offset, size))] += 1
    assert all((count == 1).all() for count in covered.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_identical(tmp_path, name, dtype):
    config = CONFIGS[name]
    weights = random_weights(config, dtype)
    hf = write_hf(tmp_path / "hf", weights, config.to_hf_dict() | {"torch_dtype": str(dtype)[6:]})
    assert convert("hf", "native", hf, tmp_path / "native", "--workers", "2") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back", "--workers", "2") == 0
    assert_identical(all_tensors(tmp_path / "back"), weights)
    for file in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (hf / file).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native", "back"}


def test_native_is_read_by_dcp_itself(tmp_path):
    """torch.distributed.checkpoint finds experts stacked, gate over up."""
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "native", hf, tmp_path / "native") == 0
    weights = random_weights(V3_WIDE, torch.bfloat16)
    state = {"model.model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 280, 136),
             "model.model.layers.2.eh_proj.weight": torch.zeros(136, 272)}
    dcp.load(state, checkpoint_id=tmp_path / "native" / "iter_0000000", no_dist=True)
    assert verify_directory(tmp_path / "native" / "iter_0000000") == []
    prefix = "model.layers.1.mlp.experts.3."
    expected = torch.cat([weights[f"{prefix}gate_proj.weight"], weights[f"{prefix}up_proj.weight"]]).float()
    assert torch.equal(state["model.model.layers.1.mlp.experts.gate_up_proj"][3], expected)
    assert torch.equal(state["model.model.layers.2.eh_proj.weight"], weights["model.layers.2.eh_proj.weight"].float())


def test_shards_are_at_most_as_large_as_asked(tmp_path):
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "hf", hf, tmp_path / "out", "--max-shard-size", "200KB") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4 and all(file.stat().st_size < 210_000 for file in files)
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert_identical(all_tensors(tmp_path / "out"), all_tensors(hf))


def test_types(tmp_path):
    """Everything is cast, but a router's bias is never narrowed; the config says what was written."""
    hf = v3_directory(tmp_path / "hf", torch.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert convert("hf", "hf", hf, tmp_path / name, "--dtype", name) == 0
        expected = {key: tensor if key.endswith("correction_bias") else tensor.to(dtype)
                    for key, tensor in all_tensors(hf).items()}
        assert_identical(all_tensors(tmp_path / name), expected)
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def half_step(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Half the distance of neighbouring E4M3 numbers around values / scale, in the weights' own units."""
    spread = scales.repeat_interleave(128, 0)[:values.shape[0]].repeat_interleave(128, 1)[:, :values.shape[1]]
    exponent = (values.abs() / spread).clamp(min=2.0 ** -6).log2().floor()
    return spread * torch.exp2(exponent - 3) / 2


def test_fp8_is_within_half_a_step(tmp_path):
    """hf -> fp8 -> float32, the largest number of each block included; rounding of float32 itself on top."""
    hf = v3_directory(tmp_path / "hf", torch.float32)
    assert convert("hf", "hf", hf, tmp_path / "fp8", "--dtype", "fp8") == 0
    assert convert("hf", "hf", tmp_path / "fp8", tmp_path / "back", "--dtype", "fp32") == 0
    given, stored, back = (all_tensors(tmp_path / name) for name in ("hf", "fp8", "back"))
    quantized = [name for name in given if stored[name].dtype == torch.float8_e4m3fn]
    assert len(quantized) == 3 * 5 + 3 + 2 * (4 + 1) * 3  # attention, dense MLP, experts of two layers
    for name in quantized:
        scales = stored[f"{name}_scale_inv"]
        assert scales.shape == block_fp8.scale_shape(given[name].shape)
        bound = half_step(given[name], scales) * (1 + 1e-5) + 1e-12
        assert ((back[name] - given[name]).abs() <= bound).all(), name
    rest = {name: tensor for name, tensor in stored.items()
            if name not in quantized and not name.endswith("_scale_inv")}
    for name, tensor in rest.items():
        wide = name.endswith("correction_bias")
        assert torch.equal(tensor, given[name] if wide else given[name].bfloat16()), name


def quantization(directory) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def assert_powers_of_two(directory, weights) -> None:
    """By hand: scale = 2^ceil(log2(amax / 448)) of each block, codes = weight / scale rounded to nearest."""
    stored = all_tensors(directory)
    names = [name for name in stored if name.endswith("_scale_inv")]
    assert len(names) == 48
    for name in names:
        weight, scale = weights[name.removesuffix("_scale_inv")].double(), stored[name].double()
        for row, column in ((row, column) for row in range(scale.shape[0]) for column in range(scale.shape[1])):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            assert scale[row, column] == 2.0 ** math.ceil(math.log2(weight[block].abs().max() / 448)), name
            codes = (weight[block] / scale[row, column]).float().to(torch.float8_e4m3fn)
            assert torch.equal(stored[name.removesuffix("_scale_inv")][block].float(), codes.float()), name


def test_power_of_two_scales(tmp_path, capsys):
    """From any source; what is V3.1's stays so through a native checkpoint; powers of two are made but once."""
    hf = v3_directory(tmp_path / "hf", torch.float32)
    weights = all_tensors(hf)
    assert convert("hf", "hf", hf, tmp_path / "v31", "--dtype", "fp8", "--fp8-scale-format", "ue8m0") == 0
    assert_powers_of_two(tmp_path / "v31", weights)
    assert quantization(tmp_path / "v31") == block_fp8.QUANTIZATION_CONFIG | {"scale_fmt": "ue8m0"}
    for name, *more in (("carried",), ("again", "--dtype", "fp8", "--fp8-scale-format", "ue8m0")):
        assert convert("hf", "hf", tmp_path / "v31", tmp_path / name, *more) == 0
        assert_identical(all_tensors(tmp_path / name), all_tensors(tmp_path / "v31"))
        assert quantization(tmp_path / name) == quantization(tmp_path / "v31")
    assert convert("hf", "native", tmp_path / "v31", tmp_path / "native") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back", "--dtype", "fp8") == 0
    assert quantization(tmp_path / "back") == quantization(tmp_path / "v31")
    assert_powers_of_two(tmp_path / "back", {name: tensor.float() for name, tensor in dequantized(tmp_path / "v31")})
    assert convert("hf", "native", hf, tmp_path / "no", "--fp8-scale-format", "ue8m0") == 2
    assert "--fp8-scale-format ue8m0 is about FP8 weights" in capsys.readouterr().err


def dequantized(directory):
    """Yield FP8 weights as bfloat16, which native checkpoints hold."""
    stored = all_tensors(directory)
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        yield weight, block_fp8.dequantize(stored[weight], stored[name]).bfloat16()


def test_scales_of_any_value_become_powers_of_two(tmp_path):
    """And the other way only what config.json says of them changes: a power of two is a value like any other."""
    hf = v3_directory(tmp_path / "hf", torch.float32)
    assert convert("hf", "hf", hf, tmp_path / "v3", "--dtype", "fp8") == 0
    assert "scale_fmt" not in quantization(tmp_path / "v3")
    assert convert("hf", "hf", tmp_path / "v3", tmp_path / "v31", "--fp8-scale-format", "ue8m0") == 0
    stored = all_tensors(tmp_path / "v3")
    assert_powers_of_two(tmp_path / "v31", {name.removesuffix("_scale_inv"): block_fp8.dequantize(
        stored[name.removesuffix("_scale_inv")], stored[name]) for name in stored if name.endswith("_scale_inv")})
    assert convert("hf", "hf", tmp_path / "v31", tmp_path / "any", "--fp8-scale-format", "float32") == 0
    assert_identical(all_tensors(tmp_path / "any"), all_tensors(tmp_path / "v31"))
    assert quantization(tmp_path / "any") == quantization(tmp_path / "v3")


def test_scales_may_be_stored_as_exponents(tmp_path):
    """float8_e8m0fnu, as later releases have them: the same weights."""
    hf = v3_directory(tmp_path / "hf", torch.float32)
    assert convert("hf", "hf", hf, tmp_path / "v31", "--dtype", "fp8", "--fp8-scale-format", "ue8m0") == 0
    stored = {name: tensor.to(torch.float8_e8m0fnu) if name.endswith("_scale_inv") else tensor
              for name, tensor in all_tensors(tmp_path / "v31").items()}
    write_hf(tmp_path / "e8m0", stored, json.loads((tmp_path / "v31" / "config.json").read_text()))
    for name in ("v31", "e8m0"):
        assert convert("hf", "hf", tmp_path / name, tmp_path / f"{name}-wide", "--dtype", "fp32") == 0
    assert_identical(all_tensors(tmp_path / "e8m0-wide"), all_tensors(tmp_path / "v31-wide"))


def test_scales_that_are_no_powers_of_two_are_not_carried_as_such(tmp_path, capsys):
    """Kernels read the exponent alone and would compute with other weights."""
    hf = v3_directory(tmp_path / "hf", torch.float32)
    assert convert("hf", "hf", hf, tmp_path / "v3", "--dtype", "fp8") == 0
    path = tmp_path / "v3" / "config.json"
    path.write_text(path.read_text().replace('"fmt": "e4m3"', '"fmt": "e4m3", "scale_fmt": "ue8m0"'))
    assert convert("hf", "hf", tmp_path / "v3", tmp_path / "out") == 2
    assert "which is no power of two, although scale_fmt 'ue8m0' in config.json says" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fp8_passes_through_and_comes_into_native_as_bf16(tmp_path):
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "hf", hf, tmp_path / "fp8", "--dtype", "fp8") == 0
    for number, more in enumerate(([], ["--dtype", "fp8"])):
        assert convert("hf", "hf", tmp_path / "fp8", tmp_path / f"again{number}", *more) == 0
        assert_identical(all_tensors(tmp_path / f"again{number}"), all_tensors(tmp_path / "fp8"))
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["fmt"] == "e4m3"
    assert convert("hf", "native", tmp_path / "fp8", tmp_path / "native") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "bf16") == 0
    name = "model.layers.0.mlp.down_proj.weight"
    stored = all_tensors(tmp_path / "fp8")
    values = block_fp8.dequantize(stored[name], stored[f"{name}_scale_inv"]).bfloat16()
    assert torch.equal(all_tensors(tmp_path / "bf16")[name], values)
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())


def test_block_scales_by_hand():
    """Largest magnitude / 448 of each block; a block of zeros stays zero."""
    weight = torch.zeros(130, 256)
    weight[5, 7], weight[6, 8], weight[129, 255] = -896.0, 3.0, 224.0
    quantized, scales = block_fp8.quantize(weight)
    assert scales.tolist() == [[2.0, 1.0], [1.0, 0.5]]
    assert quantized[5, 7] == -448 and quantized[6, 8] == 1.5 and quantized[129, 255] == 448
    assert torch.equal(block_fp8.dequantize(quantized, scales), weight)


@pytest.mark.parametrize("multiple", [1, 128])
def test_blocks_of_rows_cover_a_large_tensor(multiple):
    ranges = list(row_ranges((129280, 7168), 0, 129280, multiple))
    assert ranges[0][0] == 0 and ranges[-1][1] == 129280
    assert all(a[1] == b[0] and b[0] % multiple == 0 for a, b in zip(ranges, ranges[1:]))
    assert max(b - a for a, b in ranges) * 7168 * 4 <= max(1 << 20, multiple * 7168 * 4)


def test_the_source_dialect_is_written_back(tmp_path):
    """What training changed is changed, in the dialect of the file; all else stays, unknown fields too."""
    given = V3_WIDE.to_hf_dict() | {"auto_map": {"AutoModel": "x"}, "eos_token_id": [1, 2]}
    theirs = ModelConfig.from_hf_dict(given)
    longer = replace(theirs, rope_scaling=RopeScaling("yarn", 80.0, 32, mscale_all_dim=1.0), aux_loss_alpha=0.5)
    for parameters in (False, True):
        fields = dict(given)
        if parameters:
            scaling = fields.pop("rope_scaling")
            fields["rope_parameters"] = {"rope_type": scaling.pop("type"), "rope_theta": 10000.0, **scaling}
            del fields["rope_theta"]
        directory = tmp_path / str(parameters)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(fields))
        write_config(directory, longer, read_assets(directory), {torch.bfloat16: 1})
        written = json.loads((directory / "config.json").read_text())
        assert ModelConfig.from_hf_dict(written) == longer
        assert written["auto_map"] == {"AutoModel": "x"} and written["eos_token_id"] == [1, 2]
        assert written.keys() == fields.keys()
        assert written["rope_parameters" if parameters else "rope_scaling"]["factor"] == 80.0


def test_gready_goes_out_as_greedy(tmp_path):
    """Neither DeepSeek's modeling code nor transformers' has a branch for its own default."""
    fields = V2_SMALL.to_hf_dict() | {"topk_method": "gready"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_config(tmp_path, ModelConfig.from_hf_dict(fields), read_assets(tmp_path), {torch.bfloat16: 1})
    assert json.loads((tmp_path / "config.json").read_text()) == fields | {"topk_method": "greedy"}


def test_mtp_copies_come_out_where_the_source_had_them(tmp_path):
    copies = mtp_copies(V3_WIDE)
    assert sorted(copies) == ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"]
    weights = random_weights(V3_WIDE, torch.bfloat16, copies=False)
    hf = write_hf(tmp_path / "hf", weights, V3_WIDE.to_hf_dict())
    assert convert("hf", "native", hf, tmp_path / "native") == 0
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back") == 0
    assert_identical(all_tensors(tmp_path / "back"), weights)


def test_without_mtp(tmp_path, capsys):
    """By request, and where the files hold none of what num_nextn_predict_layers announces, as transformers saves."""
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "native", hf, tmp_path / "native", "--no-mtp") == 0
    assert "part of an MTP module" in capsys.readouterr().out
    main_only = {name: tensor for name, tensor in all_tensors(hf).items() if ".layers.2." not in name}
    announced = write_hf(tmp_path / "announced", main_only, V3_WIDE.to_hf_dict())
    for load in (tmp_path / "native", announced):
        origin = "native" if load == tmp_path / "native" else "hf"
        assert convert(origin, "hf", load, tmp_path / f"{load.name}_out") == 0
        said = "holds none of the modules that its config.json announces (num_nextn_predict_layers 1)"
        assert (said in capsys.readouterr().out) == (load == announced)
        written = json.loads((tmp_path / f"{load.name}_out" / "config.json").read_text())
        assert written["num_nextn_predict_layers"] == 0
        assert_identical(all_tensors(tmp_path / f"{load.name}_out"), main_only)
    assert sorted(main_only) == sorted(hf_shapes(replace(V3_WIDE, num_nextn_predict_layers=0)))


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_announced_mtp_that_no_file_holds_is_never_announced_again(tmp_path, key):
    """There and back through every format, the way back with the config.json that announces it too."""
    main_only = random_weights(replace(V3_WIDE, num_nextn_predict_layers=0), torch.bfloat16)
    fields = V3_WIDE.to_hf_dict()
    del fields["num_nextn_predict_layers"]
    load = write_hf(tmp_path / "hf", main_only, fields | {key: 1})
    for middle in ("native", "megatron"):
        assert convert("hf", middle, load, tmp_path / middle) == 0
        assert convert(middle, "hf", tmp_path / middle, tmp_path / f"{middle}_back") == 0
    assert convert("megatron", "hf", tmp_path / "megatron", tmp_path / "assets_back", "--assets", str(load)) == 0
    assert convert("megatron", "native", tmp_path / "megatron", tmp_path / "other", "--assets", str(load)) == 0
    assert convert("native", "hf", tmp_path / "other", tmp_path / "other_back") == 0
    for back in ("native_back", "megatron_back", "assets_back", "other_back"):
        written = json.loads((tmp_path / back / "config.json").read_text())
        assert written == fields | {key: 0}, back
        assert_identical(all_tensors(tmp_path / back), main_only)


@pytest.mark.parametrize("there, here, said", [
    (0, 1, "it holds no Multi-Token Prediction module, the model has 1: --mtp-num-layers 0 goes on with what there is, "
           "--init-mtp adds 1 new"),
    (1, 2, "it holds 1 Multi-Token Prediction module, the model has 2: --mtp-num-layers 1 goes on with what there is, "
           "--init-mtp adds 1 new"),
    (1, 0, "it holds 1 Multi-Token Prediction module, the model has 0: --mtp-num-layers 1 keeps what there is, "
           "--mtp-num-layers 0 does without where a run takes over the weights alone (--finetune), "
           "tools/convert_checkpoint.py --no-mtp makes a copy without")])
def test_another_number_of_mtp_modules_names_the_ways(tmp_path, there, here, said):
    """The config.json of the files announces one in each case, whatever they hold."""
    load = v3_directory(tmp_path / "hf", num_nextn_predict_layers=there)
    (load / "config.json").write_text(json.dumps(V3_WIDE.to_hf_dict()))
    model = replace(V3_WIDE, num_nextn_predict_layers=here)
    with pytest.raises(ValueError) as caught:
        check_checkpoint(load, model)
    assert str(caught.value) == f"--load {load}: {said}"
    if there < here:
        assert check_checkpoint(load, model, init_mtp=True) == load
    with pytest.raises(ValueError, match="of another architecture: hidden_size 136 there, 144 here$"):
        check_checkpoint(load, replace(model, hidden_size=144))


def test_a_part_of_an_announced_module_is_an_error(tmp_path, capsys):
    """Lost, not left out: of an MTP module a tensor is there, and the others are asked for."""
    weights = random_weights(V3_WIDE, torch.bfloat16)
    some = {name: tensor for name, tensor in weights.items() if ".layers.2." not in name or "enorm" in name}
    load = write_hf(tmp_path / "hf", some, V3_WIDE.to_hf_dict())
    assert convert("hf", "native", load, tmp_path / "native") == 2
    assert "tensors that config.json asks for, first model.layers.2." in capsys.readouterr().err


def test_looking_writes_nothing(tmp_path, capsys):
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "native", hf, tmp_path / "out", "--layers", "1-2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("model.layers.2.eh_proj.weight [136, 272] bfloat16 -> bfloat16") for line in lines)
    assert not any("layers.0." in line or "lm_head" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("origin, files, words", [
    ("hf", ["latest_checkpointed_iteration.txt"], "holds checkpoints, not a Hugging Face model: --from native"),
    ("hf", [".metadata"], "holds checkpoints, not a Hugging Face model: --from native"),
    ("native", ["model.safetensors"], "is a Hugging Face model: --from hf, not native"),
    ("megatron", ["model.safetensors"], "is a Hugging Face model: --from hf, not megatron")])
def test_a_directory_of_another_format_is_told(tmp_path, capsys, origin, files, words):
    for name in files:
        (tmp_path / name).write_text("1")
    target = "native" if origin == "hf" else "hf"
    assert main(["--from", origin, "--to", target, "--load", str(tmp_path), "--save", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"convert_checkpoint.py: error: --load {tmp_path} {words}" + (
        ", or megatron\n" if origin == "hf" else "\n")
