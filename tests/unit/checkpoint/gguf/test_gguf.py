"""GGUF files without llama.cpp: every weight in its place, several files, mistakes (tests/engines has llama.cpp)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_models import DENSE
from gguf import GGUFReader
from gguf.quants import dequantize
from small_checkpoints import V3_WIDE, all_tensors, convert, random_weights, v3_directory, write_hf
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_deepseek.checkpoint.convert.tokenizer_files import replace_tokenizer, tokenizer_to_keep
from megatron_deepseek.checkpoint.gguf import output
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling

MLA = {"attn_kv_a_mqa": "kv_a_proj_with_mqa", "attn_q_a": "q_a_proj", "attn_q_b": "q_b_proj", "attn_output": "o_proj",
       "attn_q_a_norm": "q_a_layernorm", "attn_kv_a_norm": "kv_a_layernorm"}


def add_tokenizer(directory: Path) -> Path:
    replace_tokenizer(directory, tokenizer_to_keep("ByteTokenizer", None)[0])
    return directory


def with_tokenizer(directory: Path, *dtype: torch.dtype, **changes) -> Path:
    return add_tokenizer(v3_directory(directory, *dtype, **changes))


def read(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files of a model, in float32, in the order of dimensions of PyTorch."""
    found = {}
    for file in sorted(directory.glob("*.gguf")):
        for tensor in GGUFReader(file).tensors:
            assert tensor.name not in found
            shape = tuple(reversed(tensor.shape.tolist()))
            found[tensor.name] = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).view(shape)
    return found


def expected(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """By hand, of the architecture deepseek2, from the layout that llama.cpp's src/models/deepseek2.cpp loads."""
    found = {"token_embd.weight": weights["model.embed_tokens.weight"], "output.weight": weights["lm_head.weight"],
             "output_norm.weight": weights["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        block, prefix = f"blk.{layer}.", f"model.layers.{layer}."
        found |= {f"{block}{ours}.weight": weights[f"{prefix}self_attn.{name}.weight"] for ours, name in MLA.items()}
        found[f"{block}attn_norm.weight"] = weights[prefix + "input_layernorm.weight"]
        found[f"{block}ffn_norm.weight"] = weights[prefix + "post_attention_layernorm.weight"]
        heads = weights[prefix + "self_attn.kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, -1))
        found[f"{block}attn_k_b.weight"] = heads[:, :config.qk_nope_head_dim].transpose(1, 2)
        found[f"{block}attn_v_b.weight"] = heads[:, config.qk_nope_head_dim:]
        for part in ("gate", "up", "down"):
            name = prefix + "mlp.{}" + f"{part}_proj.weight"
            if layer < config.first_k_dense_replace:
                found[f"{block}ffn_{part}.weight"] = weights[name.format("")]
                continue
            found[f"{block}ffn_{part}_shexp.weight"] = weights[name.format("shared_experts.")]
            found[f"{block}ffn_{part}_exps.weight"] = torch.stack([
                weights[name.format(f"experts.{expert}.")] for expert in range(config.n_routed_experts)])
        if layer >= config.first_k_dense_replace:
            found[f"{block}ffn_gate_inp.weight"] = weights[prefix + "mlp.gate.weight"]
            found[f"{block}exp_probs_b.bias"] = weights[prefix + "mlp.gate.e_score_correction_bias"]
    return {name: tensor.float() for name, tensor in found.items()}


@pytest.mark.parametrize("origin", ["hf", "native"])
@pytest.mark.parametrize("stored, dtype", [(torch.float32, "fp32"), (torch.bfloat16, None)])
def test_every_weight_is_in_its_place(tmp_path, origin, stored, dtype):
    hf = with_tokenizer(tmp_path / "hf", stored)
    load = hf
    if origin == "native":
        assert convert("hf", "native", hf, tmp_path / "native") == 0
        load = tmp_path / "native"
    assert convert(origin, "gguf", load, tmp_path / "out", *(["--dtype", dtype] if dtype else [])) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-F32.gguf" if dtype else "model-BF16.gguf"]
    found, wanted = read(tmp_path / "out"), expected(all_tensors(hf), V3_WIDE)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def test_fp8_is_read_by_its_blocks(tmp_path):
    """Heads begin where no block of 128 rows does."""
    assert convert("hf", "hf", with_tokenizer(tmp_path / "hf"), tmp_path / "fp8", "--dtype", "fp8") == 0
    assert convert("hf", "hf", tmp_path / "fp8", tmp_path / "fp32", "--dtype", "fp32") == 0
    assert convert("hf", "gguf", tmp_path / "fp8", tmp_path / "out", "--dtype", "fp32") == 0
    assert convert("hf", "gguf", tmp_path / "fp8", tmp_path / "by_itself") == 0
    found, wanted = read(tmp_path / "out"), expected(all_tensors(tmp_path / "fp32"), V3_WIDE)
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert (tmp_path / "by_itself" / "model-BF16.gguf").exists()


def test_the_type_is_that_of_most_numbers(tmp_path):
    """Experts in BF16 are fewer tensors than what is in float32 beside them, but more numbers."""
    config = replace(V3_WIDE, moe_intermediate_size=600)
    weights = {name: tensor.bfloat16() if ".experts." in name else tensor
               for name, tensor in random_weights(config, torch.float32).items()}
    assert 2 * sum(tensor.dtype == torch.bfloat16 for tensor in weights.values()) < len(weights)
    hf = add_tokenizer(write_hf(tmp_path / "hf", weights, config.to_hf_dict()))
    assert convert("hf", "gguf", hf, tmp_path / "out") == 0
    assert (tmp_path / "out" / "model-BF16.gguf").exists()


def test_eight_bits(tmp_path):
    """Rows of a multiple of 32 numbers have 8 bits and a scale for each 32; others are F16, vectors F32."""
    hf = with_tokenizer(tmp_path / "hf", torch.float32, hidden_size=128)
    assert convert("hf", "gguf", hf, tmp_path / "out", "--dtype", "q8_0") == 0
    (file,) = (tmp_path / "out").iterdir()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["blk.1.ffn_gate_exps.weight"] == "Q8_0" and kinds["blk.1.attn_k_b.weight"] == "F16"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"
    wanted = expected(all_tensors(hf), replace(V3_WIDE, hidden_size=128))
    for name, tensor in read(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=wanted[name].abs().max().item() / 250)


@pytest.mark.parametrize("family", DENSE)
def test_dense_families(tmp_path, family):
    """Rows of a head of queries and keys are in turns in Llama's alone: first, middle, second, ... of its halves."""
    config = DENSE[family]
    weights = random_weights(config, torch.float32)
    hf = add_tokenizer(write_hf(tmp_path / "hf", weights, config.to_hf_dict()))
    assert convert("hf", "gguf", hf, tmp_path / "out") == 0
    found, query = read(tmp_path / "out"), weights["model.layers.1.self_attn.q_proj.weight"]
    if family == "llama":
        size = config.head_dim
        rows = [head * size + half * size // 2 + pair for head in range(config.num_attention_heads)
                for pair in range(size // 2) for half in (0, 1)]
        query = query[rows]
        stretched = LlamaRotaryEmbedding(AutoConfig.from_pretrained(hf)).inv_freq
        plain = config.rope_theta ** (-torch.arange(0, size, 2) / size)
        torch.testing.assert_close(found["rope_freqs.weight"], plain / stretched, rtol=1e-5, atol=0)
        assert len(found["rope_freqs.weight"].unique()) > 2
    assert torch.equal(found["blk.1.attn_q.weight"], query)
    assert torch.equal(found["blk.1.attn_v.weight"], weights["model.layers.1.self_attn.v_proj.weight"])
    assert ("output.weight" in found) == (not config.tie_word_embeddings)


def test_several_files(tmp_path):
    """The first has all keys, the others say which they are; together they have what one file has."""
    hf = with_tokenizer(tmp_path / "hf")
    assert convert("hf", "gguf", hf, tmp_path / "one") == 0
    assert convert("hf", "gguf", hf, tmp_path / "some", "--max-shard-size", "200KB", "--workers", "2") == 0
    names = sorted(path.name for path in (tmp_path / "some").iterdir())
    assert len(names) > 2 and names[1] == f"model-BF16-00002-of-{len(names):05d}.gguf"
    one, some = read(tmp_path / "one"), read(tmp_path / "some")
    assert one.keys() == some.keys() and all(torch.equal(one[name], some[name]) for name in one)
    for number, name in enumerate(names):
        fields = GGUFReader(tmp_path / "some" / name).fields
        said = [fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")]
        assert said == [number, len(names), len(one)] and ("deepseek2.block_count" in fields) == (number == 0)


def test_sampling_and_name(tmp_path):
    hf = with_tokenizer(tmp_path / "hf")
    (hf / "generation_config.json").write_text('{"temperature": 0.5, "top_p": 0.25, "top_k": 7}')
    assert convert("hf", "gguf", hf, tmp_path / "my-model") == 0
    fields = GGUFReader(tmp_path / "my-model" / "model-BF16.gguf").fields
    assert [fields[f"general.{key}"].contents() for key in ("sampling.temp", "sampling.top_p", "sampling.top_k", "name",
                                                            "file_type")] == [0.5, 0.25, 7, "my-model", 32]


YARN = V3_WIDE.rope_scaling
DIFFERENT = {
    "no rank of queries": ({"q_lora_rank": None}, "q_lora_rank None with 2 layers"),
    "a rank in Lite": ({"num_hidden_layers": 27}, "q_lora_rank 130 with 27 layers"),
    "V2's groups": ({"topk_method": "group_limited_greedy", "scoring_func": "softmax", "n_group": 2, "topk_group": 1},
                    "topk_method group_limited_greedy with topk_group 1 of 2"),
    "mscales": ({"rope_scaling": replace(YARN, mscale_all_dim=0.5)}, "mscale 1.0 and mscale_all_dim 0.5"),
    "linear": ({"rope_scaling": RopeScaling("linear", 4.0)}, "type linear"),
    "a dense layer between": ({"num_hidden_layers": 4, "moe_layer_freq": 2}, "moe_layer_freq 2"),
}


@pytest.mark.parametrize("change, message", DIFFERENT.values(), ids=DIFFERENT)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, capsys, change, message):
    config = replace(V3_WIDE, **change)
    hf = add_tokenizer(write_hf(tmp_path / "hf", random_weights(config, torch.bfloat16), config.to_hf_dict()))
    assert convert("hf", "gguf", hf, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--to gguf: " in error and message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, message", [
    (["--dtype", "fp8"], "GGUF has no FP8 weights"), (["--fp8-scale-format", "ue8m0"], "GGUF has no FP8 weights")])
def test_options_that_gguf_has_not(tmp_path, capsys, words, message):
    assert convert("hf", "gguf", with_tokenizer(tmp_path / "hf"), tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err


def test_options_that_gguf_alone_has(tmp_path, capsys):
    hf = with_tokenizer(tmp_path / "hf")
    for words in (["--dtype", "q8_0"], ["--gguf-pre-tokenizer", "qwen2"]):
        assert convert("hf", "native", hf, tmp_path / "out", *words) == 2
        assert "are about GGUF files, not --to native" in capsys.readouterr().err
    assert convert("hf", "gguf", hf, tmp_path / "model.gguf") == 2
    assert "is to be a directory" in capsys.readouterr().err


def test_dry_run_lists_tensors_of_a_layer(tmp_path, capsys):
    assert convert("hf", "gguf", with_tokenizer(tmp_path / "hf"), tmp_path / "out", "--layers", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "blk.1.attn_k_b.weight [2, 8, 6] bfloat16 -> BF16 model-BF16.gguf" in lines
    assert not [line for line in lines if line.startswith(("blk.0", "token_embd"))] and not (tmp_path / "out").exists()


def refuse(number: int):
    raise ValueError(f"file {number} is refused")


def test_other_keys_begin_anew(tmp_path, monkeypatch, capsys):
    """What a conversion that failed has finished is kept only if the keys are the same too."""
    hf, write = with_tokenizer(tmp_path / "hf"), output.write_gguf
    monkeypatch.setattr(output, "write_gguf", lambda *args: refuse(args[2]) if args[2] else write(*args))
    assert convert("hf", "gguf", hf, tmp_path / "out", "--max-shard-size", "200KB") == 2
    monkeypatch.undo()
    assert "file 1 is refused" in capsys.readouterr().err
    (hf / "generation_config.json").write_text('{"temperature": 0.125}')
    assert convert("hf", "gguf", hf, tmp_path / "out", "--max-shard-size", "200KB") == 0
    first = sorted((tmp_path / "out").glob("*.gguf"))[0]
    assert GGUFReader(first).fields["general.sampling.temp"].contents() == 0.125
