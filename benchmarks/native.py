"""Native checkpoints of any size for benchmarks: V3's kinds of layers, written as a job of four ranks writes them."""

import hashlib
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.convert.names import native_places
from megatron_deepseek.checkpoint.dcp.item_file import ItemRegion, split, write_items
from megatron_deepseek.checkpoint.dcp.metadata_writer import write_metadata
from megatron_deepseek.checkpoint.integrity import checksum_directory
from megatron_deepseek.checkpoint.job.state import MOMENTS
from megatron_deepseek.checkpoint.reshard.rank_shards import ModelDivision, find_holders
from megatron_deepseek.checkpoint.tracker import TRACKER, iteration_directory
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.presets import V3
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.planning.pipeline_balance import stages

WRITER = Layout(dp=2, tp=2, ep=4)
ITERATION = 1
_BLOCK = 1 << 18


def model_of(gigabytes: float) -> ModelConfig:
    """Return a model of two layers, the second with as many experts as make weights and moments in float32 so large.

    There are at least eight experts.
    """
    width = 2048 if gigabytes >= 1.7 else 512
    base = replace(V3, num_hidden_layers=2, first_k_dense_replace=1, hidden_size=width, intermediate_size=2 * width,
                   moe_intermediate_size=width // 2, num_attention_heads=16, n_group=1, topk_group=1,
                   num_experts_per_tok=2, vocab_size=8192, num_nextn_predict_layers=0, rope_scaling=None)
    two, four = (_nbytes(replace(base, n_routed_experts=count)) for count in (2, 4))
    experts = 2 + 2 * (gigabytes * 1e9 - two) / (four - two)
    return replace(base, n_routed_experts=max(8, 8 * round(experts / 8)))


def tensors_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that training saves; those of routers' biases get moments, too."""
    shapes = {place.whole: place.whole_shape for place in native_places(config)}
    prefixes = ("model.", *(f"optimizer.{moment}." for moment in MOMENTS))
    return {prefix + name: shape for prefix in prefixes for name, shape in shapes.items()}


def _nbytes(config: ModelConfig) -> int:
    return sum(4 * math.prod(shape) for shape in tensors_of(config).values())


def write_checkpoint(root: Path, gigabytes: float) -> int:
    """Write a SAVE with one iteration, a file for each of the WRITER's ranks, and return its size in bytes."""
    config = model_of(gigabytes)
    directory = iteration_directory(root, ITERATION)
    directory.mkdir(parents=True)
    parts: dict[int, list[ItemRegion]] = {}
    for name, boxes in find_holders(ModelDivision(config, WRITER, stages(config, 1), "1F1B")).items():
        for box, ranks in boxes.items():
            parts.setdefault(min(ranks), []).extend(split(ItemRegion(name, box, torch.float32)))
    items = []
    for rank, of_rank in sorted(parts.items()):
        name = f"__{rank}_0.distcp"
        items += write_items(directory / name, name, of_rank, _noise, lambda nbytes: None).items
    write_metadata(directory, tensors_of(config), items)
    (directory / "config.json").write_text(json.dumps(config.to_hf_dict()))
    (directory / "state.json").write_text(json.dumps(asdict(TrainState(ITERATION, 16, ITERATION))))
    checksum_directory(directory)
    (root / TRACKER).write_text(f"{ITERATION}\n")
    return sum(path.stat().st_size for path in directory.iterdir())


def _noise(part: ItemRegion):
    """Return bytes that differ from block to block; drawing real numbers would take longer than all the rest."""
    noise = bytearray(os.urandom(_BLOCK))
    for begin in range(0, part.nbytes, _BLOCK):
        noise[:16] = hashlib.md5(f"{part}{begin}".encode()).digest()
        yield memoryview(noise)[:min(_BLOCK, part.nbytes - begin)]
