"""Hugging Face directories small enough to convert in no time, written by the safetensors library."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_deepseek.checkpoint.convert.names import hf_shapes, mtp_copies
from megatron_deepseek.cli.convert_checkpoint import main
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling
from megatron_deepseek.model.architecture.parameters import BIAS

# Widths that no block of 128 divides, several blocks of rows and columns, one MTP module, YaRN as released.
V3_WIDE = ModelConfig(
    vocab_size=300, hidden_size=136, intermediate_size=264, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8,
    q_lora_rank=130, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, moe_intermediate_size=140,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
    max_position_embeddings=64, rope_scaling=RopeScaling("yarn", 40.0, 32, mscale_all_dim=1.0))


def random_weights(config: ModelConfig, dtype: torch.dtype, copies: bool = True) -> dict[str, torch.Tensor]:
    """Router biases in float32, as released; `copies`: those of MTP modules too."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).to(torch.float32 if name.endswith(BIAS) else dtype)
               for name, shape in hf_shapes(config).items()}
    if copies:
        weights |= {name: weights[original].clone() for name, original in mtp_copies(config).items()}
    return weights


def write_hf(directory: Path, weights: dict[str, torch.Tensor], fields: dict, shards: int = 2) -> Path:
    """The tensors in `shards` files with their index, config.json, and a tokenizer's and generation's files."""
    directory.mkdir(parents=True)
    names, weight_map = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({name: weights[name].contiguous() for name in mine}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return directory


def v3_directory(directory: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    config = replace(V3_WIDE, **changes)
    return write_hf(directory, random_weights(config, dtype), config.to_hf_dict())


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, as the library reads it; the index must agree with the files."""
    tensors: dict[str, torch.Tensor] = {}
    weight_map = {}
    for file in sorted(directory.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
        weight_map |= dict.fromkeys(found, file.name)
    assert json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"] == weight_map
    return tensors


def convert(origin: str, to: str, load: Path, save: Path, *more: str) -> int:
    """The command's exit status."""
    return main(["--from", origin, "--to", to, "--load", str(load), "--save", str(save), *more], {})


def assert_identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
