"""Models as they are loaded: plain, FP8 as released, NF4, with an adapter beside; from both kinds of directories."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_checkpoints import V3_WIDE, all_tensors, convert, random_weights, v3_directory, write_hf
from small_models import LLAMA_SMALL

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.inference.engine import Engine
from megatron_deepseek.inference.loading import LoadSettings, load_model
from megatron_deepseek.inference.model_files import ModelFiles, open_model
from megatron_deepseek.inference.quantised import (
    Fp8Weight,
    HeldWeight,
    Nf4Weight,
    PlainWeight,
    dense_weight,
    exchange,
    held_weight,
)
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext
from megatron_deepseek.ops import nf4
from megatron_deepseek.ops.fp8 import encoding
from megatron_deepseek.ops.grouped_gemm import grouped_gemm
from megatron_deepseek.ops.precision_recipe import Grouped, Linear

LINEAR = "model.layers.1.self_attn.q_b_proj"
EXPERTS = "model.layers.1.mlp.experts"
HELD = {"fp8": Fp8Weight, "nf4": Nf4Weight}
I = V3_WIDE.moe_intermediate_size  # noqa: E741 (the papers' name)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return v3_directory(tmp_path_factory.mktemp("loading") / "hf", torch.bfloat16)


@pytest.fixture(scope="module")
def fp8(released) -> Path:
    directory = released.with_name("fp8")
    assert convert("hf", "hf", released, directory, "--dtype", "fp8") == 0
    return directory


@pytest.fixture(scope="module")
def native(released) -> Path:
    directory = released.with_name("native")
    assert convert("hf", "native", released, directory, "--dtype", "fp32") == 0
    return directory


def opened(directory: Path, mtp: bool = False) -> ModelFiles:
    return open_model(directory, mtp=mtp, tokenizer=None)


def logits(model, tokens: list[int]) -> torch.Tensor:
    """[S, V] of the training model's own forward."""
    tokens_BS = torch.tensor([tokens])
    labels = tokens_BS.unsqueeze(1)
    with torch.no_grad():
        state, *_ = model.stage.states(tokens_BS, MicroBatch(Rows(labels, torch.zeros_like(labels))), StepContext(1))
        return model.stage.logits(state)[0]


def test_plain_weights_of_both_kinds_of_directories(released, native, meshes):
    """In the dtype of the files, unless told otherwise; routers and their biases always in float32."""
    theirs = all_tensors(released)
    for directory, dtype in ((released, torch.bfloat16), (native, torch.float32)):
        model = load_model(opened(directory, mtp=True), meshes, LoadSettings(max_length=16))
        assert model.dtype == dtype and model.config.num_nextn_predict_layers == 1
        assert torch.equal(dense_weight(model.stage.get_submodule(LINEAR), dtype), theirs[f"{LINEAR}.weight"].to(dtype))
        gate_up = model.stage.get_submodule(EXPERTS).gate_up_proj  # packed only where the processor can
        gate_up = gate_up.dense(dtype) if isinstance(gate_up, HeldWeight) else gate_up
        assert torch.equal(gate_up[3, :I], theirs[f"{EXPERTS}.3.gate_proj.weight"].to(dtype))
        assert torch.equal(dense_weight(model.stage.get_submodule("model.layers.2.eh_proj"), dtype),
                           theirs["model.layers.2.eh_proj.weight"].to(dtype))
        gate = model.stage.get_submodule("model.layers.1.mlp.gate")
        assert gate.weight.dtype == gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, theirs["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert opened(released).config.num_nextn_predict_layers == 0
    assert load_model(opened(released), meshes, LoadSettings(dtype=torch.float32)).stage.rope_2SD.shape[1] == 64


def test_fp8_is_kept_as_released(fp8, released, native, meshes):
    """The same codes and scales; quantised here from other files they are those that a conversion writes."""
    theirs = all_tensors(fp8)
    x = torch.randn(5, V3_WIDE.q_lora_rank, generator=torch.Generator().manual_seed(0))
    for directory in (fp8, released, native):
        model = load_model(opened(directory), meshes, LoadSettings(form="fp8", dtype=torch.float32))
        linear = model.stage.get_submodule(LINEAR)
        held = held_weight(linear)
        assert torch.equal(held.codes.view(torch.uint8), theirs[f"{LINEAR}.weight"].view(torch.uint8))
        assert torch.equal(held.scales, theirs[f"{LINEAR}.weight_scale_inv"])
        plain = block_fp8.dequantize(theirs[f"{LINEAR}.weight"], theirs[f"{LINEAR}.weight_scale_inv"])
        assert torch.equal(dense_weight(linear, torch.float32), plain)
        expected = rounded(x).double() @ plain.double().t()
        torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-5)  # float32's sums
    assert opened(fp8).form == "fp8" and opened(fp8).dtype == torch.bfloat16 and opened(released).form == "plain"


def test_fp8_experts_whose_blocks_lie_across_a_stack(fp8, meshes):
    """The experts' width is 140: up's blocks begin at row 140 of the stack, so that each row has scales of its own."""
    theirs = all_tensors(fp8)
    model = load_model(opened(fp8), meshes, LoadSettings(dtype=torch.float32))
    experts = model.stage.get_submodule(EXPERTS)
    for number in range(4):
        whole = [block_fp8.dequantize(theirs[f"{EXPERTS}.{number}.{name}.weight"],
                                      theirs[f"{EXPERTS}.{number}.{name}.weight_scale_inv"])
                 for name in ("gate_proj", "up_proj", "down_proj")]
        assert torch.equal(experts.gate_up_proj.dense(torch.float32)[number], torch.cat(whole[:2]))
        assert torch.equal(experts.down_proj.dense(torch.float32)[number], whole[2])


def test_a_forward_in_fp8(fp8, meshes):
    """It is that of the plain numbers, with every product's input rounded to E4M3 tiles.

    Both add up in float32, in another order; where that moves an input over the middle between two codes, that one
    differs by 1/16, and with it this token and what sees it. So most tokens agree to rounding, and all nearly.
    """
    tokens, settings = [3, 14, 15, 92, 65, 35], dict(dtype=torch.float32, max_length=6)
    held = load_model(opened(fp8), meshes, LoadSettings(**settings))
    plain = load_model(opened(fp8), meshes, LoadSettings(**settings, form="plain"))
    got, unrounded = logits(held, tokens), logits(plain, tokens)
    for name, module in plain.stage.named_modules():
        if isinstance(getattr(held.stage.get_submodule(name), "weight", None), Fp8Weight):
            module.gemm = Linear(multiply=lambda x, weight: F.linear(rounded(x), numbers(weight)))
        elif name.endswith("experts") and "shared" not in name:
            module.up_gemm = module.down_gemm = Grouped(
                multiply=lambda x, weight, counts: grouped_gemm(rounded(x), numbers(weight), counts))
    expected = logits(plain, tokens)
    errors_S = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors_S.median() < 1e-5 and errors_S.max() < 0.03
    assert ((unrounded - expected).norm(dim=1) / expected.norm(dim=1)).median() > 0.03


def numbers(weight: torch.Tensor | HeldWeight) -> torch.Tensor:
    return weight.dense(torch.float32) if isinstance(weight, HeldWeight) else weight


def rounded(x: torch.Tensor) -> torch.Tensor:
    return encoding.dequantize_1x128(*encoding.quantize_1x128(x))


@pytest.mark.parametrize("double", [False, True])
def test_nf4(released, fp8, meshes, double):
    """Every weight is that of the reference, experts one by one, from FP8 too; products are those of its numbers."""
    for directory in (released, fp8):
        source = opened(directory)
        model = load_model(source, meshes, LoadSettings(form="nf4", dtype=torch.float32, double_quantization=double))
        checked = {f"{LINEAR}.weight": dense_weight(model.stage.get_submodule(LINEAR), torch.float32)}
        experts = model.stage.get_submodule(EXPERTS)
        checked[f"{EXPERTS}.2.down_proj.weight"] = experts.down_proj.dense(torch.float32)[2]
        checked[f"{EXPERTS}.2.up_proj.weight"] = experts.gate_up_proj.dense(torch.float32)[2, I:]
        for name, found in checked.items():
            whole = nf4.quantize(source.source.read(name, 0, source.source.shapes[name][0]))
            expected = nf4.dequantize(whole.with_double_scales() if double else whole)
            assert torch.equal(found, expected), name
        rows = torch.randn(7, V3_WIDE.hidden_size, generator=torch.Generator().manual_seed(1))
        got = experts.gate_up_proj.multiply_grouped(rows, [3, 0, 4, 0])
        dense = experts.gate_up_proj.dense(torch.float32)
        torch.testing.assert_close(got, torch.cat([rows[:3] @ dense[0].t(), rows[3:] @ dense[2].t()]))
    gate = held_weight(model.stage.get_submodule("model.layers.0.mlp.gate_proj"))  # 264 rows of 136, padded to 192
    assert gate.nbytes == 264 * (96 + (3 + 8 if double else 3 * 4))  # 3 scales of each


def write_adapter(directory: Path, weights: dict[str, torch.Tensor], **config) -> Path:
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6, "r": 3} | config))
    return directory


def lora(names: dict[str, tuple[int, int]], rank: int = 3) -> dict[str, torch.Tensor]:
    generator, found = torch.Generator().manual_seed(5), {}
    for name, (outputs, inputs) in names.items():
        found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.2
        found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.2
    return found


ADAPTED = {LINEAR: (20, 130), "model.layers.0.mlp.down_proj": (136, 264), "model.layers.1.self_attn.o_proj": (136, 16),
           "model.layers.1.mlp.shared_experts.up_proj": (140, 136)}


@pytest.mark.parametrize("form", ["plain", "nf4"])
def test_an_adapter_beside_the_base_computes_what_a_merged_one_does(released, tmp_path, meshes, form):
    """alpha / r is 2; the pattern gives o_proj alpha 12, so 4."""
    given = lora(ADAPTED)
    adapter = write_adapter(tmp_path / "adapter", given, alpha_pattern={"o_proj": 12})
    tokens, settings = [3, 14, 15, 92, 65, 35], dict(dtype=torch.float32, form=form, max_length=6)
    base = load_model(opened(released), meshes, LoadSettings(**settings))
    adapted = load_model(opened(released), meshes, LoadSettings(**settings, adapter=adapter))
    before = logits(base, tokens)
    for name in ADAPTED:
        linear, factor = base.stage.get_submodule(name), 4 if name.endswith("o_proj") else 2
        a, b = (given[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        merged = dense_weight(linear, torch.float32) + factor * b @ a
        torch.testing.assert_close(dense_weight(adapted.stage.get_submodule(name), torch.float32), merged)
        if form == "plain":
            exchange(linear, "weight", PlainWeight(merged))
    if form == "plain":
        torch.testing.assert_close(logits(adapted, tokens), logits(base, tokens), rtol=1e-4, atol=1e-4)
    assert (logits(adapted, tokens) - before).abs().max() > 0.1


def test_adapters_that_cannot_be_used(released, tmp_path, meshes):
    good, files = lora(ADAPTED), opened(released)
    for number, (weights, config, named) in enumerate((
            (good, {"peft_type": "IA3"}, '"peft_type" is "IA3", only LORA is known'),
            (good, {"use_dora": True}, '"use_dora" is true, of which nothing is known here'),
            (good, {"modules_to_save": ["lm_head"]}, '"modules_to_save" is a list of 1'),
            (lora({"model.layers.1.mlp.experts.0.q_proj": (140, 136)}), {}, "which is no linear layer of"),
            (lora({LINEAR: (20, 131)}), {}, "has 131 inputs there, the model's has 130"),
            ({f"base_model.model.{LINEAR}.lora_A.weight": torch.zeros(2, 130)}, {}, "has lora_A alone"),
            ({**good, "lm_head.weight": torch.zeros(2, 2)}, {}, "which is neither A nor B"))):
        adapter = write_adapter(tmp_path / str(number), weights, **config)
        with pytest.raises(ValueError, match=named.replace('"', '"')) as caught:
            load_model(files, meshes, LoadSettings(adapter=adapter))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_model(files, meshes, LoadSettings(adapter=tmp_path))


def test_what_generation_config_says(released, tmp_path):
    directory = v3_directory(tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": [7, 100000]}
    (directory / "config.json").write_text(json.dumps(config))
    assert opened(directory).defaults.temperature == 0.6 and opened(directory).eos_ids == (7,)
    (directory / "generation_config.json").write_text('{"eos_token_id": 5, "do_sample": false, "max_new_tokens": 9}')
    found = opened(directory)
    assert found.eos_ids == (5,) and found.defaults.greedy and found.defaults.max_tokens == 9
    (directory / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ValueError, match="generation_config.json: top_p is 7; it must be at most 1"):
        opened(directory)


def test_what_cannot_be_loaded(released, native, tmp_path, meshes):
    with pytest.raises(ValueError, match="holds no Multi-Token Prediction module, which drafts are made by"):
        opened(v3_directory(tmp_path / "without", num_nextn_predict_layers=0), mtp=True)
    with pytest.raises(ValueError, match="weights 'int3' is not one of plain, fp8, nf4"):
        LoadSettings(form="int3")
    with pytest.raises(ValueError, match="--seq-length 65 is longer than the model's max_position_embeddings 64"):
        load_model(opened(released), meshes, LoadSettings(max_length=65))
    torn = tmp_path / "torn"
    assert convert("hf", "native", released, torn) == 0
    file = max((torn / "iter_0000000").glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged: .*distcp") as caught:
        opened(torn)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_heads_that_queries_share_are_held_in_every_form(tmp_path, meshes, form):
    """Qwen2's layers: the engine's cached forward is the training model's own over the same held weights."""
    config = replace(LLAMA_SMALL, qkv_bias=True, max_position_embeddings=64)
    directory = write_hf(tmp_path / "hf", random_weights(config, torch.float32), config.to_hf_dict())
    model = load_model(opened(directory), meshes, LoadSettings(form=form, dtype=torch.float32, max_length=32))
    engine = Engine(model, EngineSettings(max_length=32, block_size=4))
    (output,), = engine.generate([[3, 1, 4, 1, 5]], SamplingParameters(max_tokens=6, temperature=0, logprobs=0))
    text = [3, 1, 4, 1, 5, *output.tokens]
    scored = logits(model, text + [0] * (model.stage.rope_2SD.shape[1] - 11)).log_softmax(-1)[4:10]
    expected = scored.gather(1, torch.tensor(output.tokens).unsqueeze(1)).flatten()
    torch.testing.assert_close(torch.tensor(output.log_probabilities), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(held_weight(model.stage.get_submodule("model.layers.0.self_attn.k_proj")), HELD[form])
