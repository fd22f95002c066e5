"""What vLLM's loader of DeepSeek-V3 asks of an export, so far as its sources say: every parameter filled, once.

tests/engines/test_vllm.py runs vLLM; this needs none of it. Names, shapes and types were read off its repository
(deepseek_v2.py at 002d6073, deepseek_mtp.py at 03356f8c, quantization/fp8.py at 0071b24b); SGLang's loader keeps the
same names. `destination` follows `load_weights` of both files: what it does to a tensor's name. `parameters` says what
the modules register.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoints import V3_WIDE, all_tensors, convert, v3_directory

from megatron_deepseek.model.architecture.config import ModelConfig

STACKED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "q_a_proj": ("fused_qkv_a_proj", 0),
           "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1)}
EXPERT = {"gate_proj": ("w13_", "w1"), "up_proj": ("w13_", "w3"), "down_proj": ("w2_", "w2")}


def destination(name: str, config: ModelConfig) -> tuple:
    """(parameter, shard): where the tensor `name` of a file goes."""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
    if layer >= config.num_hidden_layers:  # DeepSeekMTP._rewrite_spec_layer_name
        if "embed_tokens" in name:
            name = "model.embed_tokens.weight (MTP)"
        elif not any(part in name for part in ("enorm", "hnorm", "eh_proj", "shared_head")):
            name = name.replace(f"layers.{layer}.", f"layers.{layer}.mtp_block.")
    if ".mlp.experts." in name:
        prefix, rest = name.split(".mlp.experts.")
        expert, projection, kind = rest.split(".")
        stack, shard = EXPERT[projection]
        return f"{prefix}.mlp.experts.{stack}{kind}", (int(expert), shard)
    for part, (whole, shard) in STACKED.items():
        if f".{part}." in name and (whole != "fused_qkv_a_proj" or config.q_lora_rank is not None):
            return name.replace(part, whole), shard
    return name, None


def parameters(config: ModelConfig, quantized: bool) -> dict[tuple, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of what is copied to each (parameter, shard). Fp8LinearMethod and Fp8MoEMethod.create_weights:
    weights in float8_e4m3fn, weight_scale_inv in float32, of ceil(rows / 128) by ceil(columns / 128).
    """
    found = {}

    def plain(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        found[name, None] = shape, dtype

    def linear(name: str, rows: int, columns: int, shard=None) -> None:
        joint = "" if name.endswith("_") else "."
        found[f"{name}{joint}weight", shard] = (rows, columns), torch.float8_e4m3fn if quantized else torch.bfloat16
        if quantized:
            blocks = math.ceil(rows / 128), math.ceil(columns / 128)
            found[f"{name}{joint}weight_scale_inv", shard] = blocks, torch.float32

    def swiglu(name: str, width: int) -> None:
        for shard in (0, 1):
            linear(f"{name}.gate_up_proj", width, hidden, shard)
        linear(f"{name}.down_proj", hidden, width)

    hidden, heads, c = config.hidden_size, config.num_attention_heads, config
    for index in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        layer, mtp = f"model.layers.{index}", index >= c.num_hidden_layers
        if mtp:
            plain("model.embed_tokens.weight (MTP)", c.vocab_size, hidden)
            plain(f"{layer}.shared_head.head.weight", c.vocab_size, hidden)
            plain(f"{layer}.eh_proj.weight", hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                plain(f"{layer}.{norm}.weight", hidden)
            layer += ".mtp_block"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{layer}.{norm}.weight", hidden)
        attention, down = f"{layer}.self_attn", c.kv_lora_rank + c.qk_rope_head_dim
        plain(f"{attention}.kv_a_layernorm.weight", c.kv_lora_rank)
        if c.q_lora_rank is None:
            linear(f"{attention}.q_proj", heads * c.qk_head_dim, hidden)
            linear(f"{attention}.kv_a_proj_with_mqa", down, hidden)
        else:
            plain(f"{attention}.q_a_layernorm.weight", c.q_lora_rank)
            linear(f"{attention}.fused_qkv_a_proj", c.q_lora_rank, hidden, 0)
            linear(f"{attention}.fused_qkv_a_proj", down, hidden, 1)
            linear(f"{attention}.q_b_proj", heads * c.qk_head_dim, c.q_lora_rank)
        linear(f"{attention}.kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        linear(f"{attention}.o_proj", hidden, heads * c.v_head_dim)
        if index < c.first_k_dense_replace:
            swiglu(f"{layer}.mlp", c.intermediate_size)
            continue
        plain(f"{layer}.mlp.gate.weight", c.n_routed_experts, hidden)
        plain(f"{layer}.mlp.gate.e_score_correction_bias", c.n_routed_experts, dtype=torch.float32)
        swiglu(f"{layer}.mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
        for expert in range(c.n_routed_experts):
            for shard in ("w1", "w3"):
                linear(f"{layer}.mlp.experts.w13_", c.moe_intermediate_size, hidden, (expert, shard))
            linear(f"{layer}.mlp.experts.w2_", hidden, c.moe_intermediate_size, (expert, "w2"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        plain(name, c.vocab_size, hidden)
    plain("model.norm.weight", hidden)
    return found


@pytest.mark.parametrize("q_lora_rank", [130, None])
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_every_parameter_is_filled_once(tmp_path: Path, dtype, q_lora_rank):
    config = replace(V3_WIDE, q_lora_rank=q_lora_rank)
    assert convert("hf", "hf", v3_directory(tmp_path / "hf", q_lora_rank=q_lora_rank), tmp_path / "out",
                   "--dtype", dtype) == 0
    filled = {}
    for name, tensor in all_tensors(tmp_path / "out").items():
        place = destination(name, config)
        assert place not in filled, place
        filled[place] = tuple(tensor.shape), tensor.dtype
    expected = parameters(config, quantized=dtype == "fp8")
    assert filled.keys() == expected.keys(), filled.keys() ^ expected.keys()
    assert {place: (filled[place], expected[place]) for place in expected if filled[place] != expected[place]} == {}


def test_config_is_what_fp8config_reads(tmp_path: Path):
    """Fp8Config.from_config; blocks need the dynamic scheme. Without FP8 nothing says that there is any."""
    hf = v3_directory(tmp_path / "hf")
    for dtype in ("fp8", "bf16"):
        assert convert("hf", "hf", hf, tmp_path / dtype, "--dtype", dtype) == 0
    fields = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert fields["architectures"] == ["DeepseekV3ForCausalLM"] and fields["num_nextn_predict_layers"] == 1
    assert fields["torch_dtype"] == "bfloat16"  # of activations, and of what is not quantised
    assert fields["quantization_config"] == {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                                             "activation_scheme": "dynamic"}
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
