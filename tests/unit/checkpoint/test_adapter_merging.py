"""tools/merge_lora.py against W + scale * B A by hand: BF16, FP8 blocks, several adapters, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import all_tensors, convert, v3_directory

from megatron_deepseek.checkpoint.adapter import merging
from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.cli import merge_lora_run
from megatron_deepseek.cli.merge_lora import main

RANK, ALPHA = 3, 6
LAYERS = {"model.layers.1.self_attn.q_b_proj": (20, 130), "model.layers.0.mlp.down_proj": (136, 264),
          "model.layers.1.mlp.experts.2.up_proj": (140, 136), "model.layers.2.eh_proj": (136, 272)}


def factors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, (rows, columns) in LAYERS.items():
        found[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        found[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return found


def write(directory: Path, weights: dict[str, torch.Tensor], **config) -> Path:
    directory.mkdir()
    mtp = {name: tensor for name, tensor in weights.items() if ".layers.2." in name}
    save_file({name: tensor for name, tensor in weights.items() if name not in mtp},
              directory / "adapter_model.safetensors")
    if mtp:
        save_file(mtp, directory / "adapter_model_mtp.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": ALPHA, "r": RANK}
                                                              | config))
    return directory


def delta(layer: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b = (weights[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
    return ALPHA / RANK * b @ a


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return v3_directory(tmp_path_factory.mktemp("merging") / "hf", torch.bfloat16)


def merge(*words) -> int:
    return main([str(word) for word in words])


def test_bf16_is_the_sum_rounded_once_and_the_rest_is_untouched(released, tmp_path):
    """Of an MTP module and an expert too; two adapters with weights."""
    one, two = factors(), factors(1)
    directories = [write(tmp_path / str(number), weights) for number, weights in enumerate((one, two))]
    assert merge("--base", released, "--save", tmp_path / "out", "--adapter", 0.5, directories[0], -2, directories[1],
                 "--max-shard-size", "1MB") == 0
    before, after = all_tensors(released), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in after.items():
        layer = name.removesuffix(".weight")
        if layer in LAYERS:
            expected = before[name].float() + 0.5 * delta(layer, one) - 2 * delta(layer, two)
            torch.testing.assert_close(tensor.float(), expected, rtol=2**-8, atol=1e-5)  # bfloat16's rounding
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name]), name


def test_fp8_is_dequantised_added_to_and_quantised_again(released, tmp_path):
    """By the definition of the format: the scale of a block is its largest number / 448."""
    assert convert("hf", "hf", released, tmp_path / "fp8", "--dtype", "fp8") == 0
    weights = factors()
    adapter = write(tmp_path / "adapter", weights)
    assert merge("--base", tmp_path / "fp8", "--adapter", adapter, "--save", tmp_path / "out") == 0
    before, after = all_tensors(tmp_path / "fp8"), all_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    whole = block_fp8.dequantize(before[f"{name}.weight"], before[f"{name}.weight_scale_inv"]) + delta(name, weights)
    scales = after[f"{name}.weight_scale_inv"]
    assert scales[1, 2] == pytest.approx((whole[128:, 256:].abs().max() / 448).item(), rel=1e-6)
    found = block_fp8.dequantize(after[f"{name}.weight"], scales)
    error = (found - whole).abs() / scales.repeat_interleave(128, 0)[:136].repeat_interleave(128, 1)[:, :264]
    assert error.max() <= 16.001  # half a step of E4M3 between 256 and 448, in units of the scale
    for other in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.experts.1.up_proj"):
        for suffix in (".weight", ".weight_scale_inv"):
            assert torch.equal(after[other + suffix].view(torch.uint8), before[other + suffix].view(torch.uint8))


def test_fp8_with_scales_that_are_powers_of_two(released, tmp_path):
    """As V3.1's: what is quantised again gets such scales too."""
    assert convert("hf", "hf", released, tmp_path / "fp8", "--dtype", "fp8", "--fp8-scale-format", "ue8m0") == 0
    adapter = write(tmp_path / "adapter", factors())
    assert merge("--base", tmp_path / "fp8", "--adapter", adapter, "--save", tmp_path / "out") == 0
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    before, after = all_tensors(tmp_path / "fp8")[name], all_tensors(tmp_path / "out")[name]
    assert torch.equal(after.log2(), after.log2().round()) and not torch.equal(after, before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"


def test_a_block_whose_largest_number_moves(monkeypatch):
    """A block of 4.48 everywhere, and 4.48 more at one place: the scale goes from .01 to .02, and all stays exact."""
    codes, scale = block_fp8.quantize(torch.full((128, 128), 4.48))

    class Base:
        shapes, dtypes = {"w": (128, 128)}, {"w": torch.float8_e4m3fn}

        def read(self, name, start, stop):
            return block_fp8.dequantize(codes, scale)[start:stop]

    class Rank1:
        def __init__(self, tensor):
            self.tensor = tensor

        def read(self, start=0, stop=None):
            return self.tensor[start:stop]

    a, b = torch.zeros(1, 128), torch.zeros(128, 1)
    a[0, 5], b[3, 0] = 1.0, 4.48
    source = merging.MergedSource(Base(), {"w": [(merging.Pair(Rank1(a), Rank1(b), 1.0), 1.0)]})
    merged, scales = source.read_fp8("w", 0, 128)
    assert (scale.item(), scales.item()) == (pytest.approx(0.01), pytest.approx(0.02))
    expected = torch.full((128, 128), 4.48)
    expected[3, 5] = 8.96
    torch.testing.assert_close(block_fp8.dequantize(merged, scales), expected, rtol=1e-6, atol=0)


def test_goes_on_where_it_was_killed(released, tmp_path, monkeypatch, capsys):
    """The files that were finished are not written again."""
    adapter = write(tmp_path / "adapter", factors())
    words = "--base", released, "--save", tmp_path / "out", "--max-shard-size", "1MB", "--adapter", adapter
    read, names, last = merging.MergedSource.read, set(), "model.layers.2.eh_proj.weight"

    def reads(self, name, start, stop):
        if name == last and not names:
            raise ValueError("the disk is gone")
        return read(self, name, start, stop)

    monkeypatch.setattr(merging.MergedSource, "read", reads)
    assert merge(*words) == 2 and not (tmp_path / "out").exists()
    monkeypatch.setattr(merging.MergedSource, "read",
                        lambda self, name, *rows: names.add(name) or read(self, name, *rows))
    assert merge(*words) == 0
    assert "continuing the merge" in capsys.readouterr().err
    assert last in names and "model.layers.0.mlp.down_proj.weight" not in names


@pytest.mark.parametrize("changes, config, message", [
    ({"base_model.model.model.layers.1.self_attn.q_proj": (130, 20)}, {}, "adapts model.layers.1.self_attn.q_proj, "
     "which"),
    ({"base_model.model.model.layers.0.mlp.up_proj": (130, 264)}, {}, "as 264 x 130, in"),
    ({}, {"r": 4}, "has rank 3, adapter_config.json says 4"), ({}, {"use_dora": True}, "use_dora"),
    ({}, {"peft_type": "IA3"}, "only LORA")])
def test_adapters_that_do_not_fit(released, tmp_path, capsys, changes, config, message):
    weights = factors()
    for layer, (columns, rows) in changes.items():
        weights |= {f"{layer}.lora_A.weight": torch.zeros(RANK, columns),
                    f"{layer}.lora_B.weight": torch.zeros(rows, RANK)}
    adapter = write(tmp_path / "adapter", weights, **config)
    assert merge("--base", released, "--adapter", adapter, "--save", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not (tmp_path / "out").exists()


def test_a_pickle_is_refused(tmp_path, released, capsys):
    adapter = write(tmp_path / "adapter", factors())
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert merge("--base", released, "--adapter", adapter, "--save", tmp_path / "out") == 2
    assert "a pickle" in capsys.readouterr().err


def test_directories_with_weights_and_without():
    parse = merge_lora_run.parse_adapters
    assert parse(["a", "b"]) == [(Path("a"), 1.0), (Path("b"), 1.0)]
    assert parse(["0.5", "a", "-1", "b"]) == [(Path("a"), 0.5), (Path("b"), -1.0)]
    for wrong in (["a", "0.5"], ["0.5"], ["0.5", "a", "b"], ["0.5", "1", "a", "b"]):
        with pytest.raises(ValueError, match="--adapter"):
            parse(wrong)
