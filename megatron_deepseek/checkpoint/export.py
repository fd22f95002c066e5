"""From training to Hugging Face's form: what came with loaded weights is kept, and goes out with the trained ones."""

import os
import shutil

import torch

from megatron_deepseek.checkpoint.assets import DIRECTORY, write_native_assets
from megatron_deepseek.checkpoint.conversion import convert
from megatron_deepseek.checkpoint.formats import hf_target, open_hf, open_native
from megatron_deepseek.checkpoint.marker import is_huggingface
from megatron_deepseek.checkpoint.production import Share
from megatron_deepseek.settings import RunSettings

_SHARD_BYTES = 5 * 10**9


def keep_assets(run: RunSettings) -> None:
    """On rank 0: config.json, tokenizer and the like of --load stay with the checkpoints of --save."""
    if os.environ.get("RANK", "0") != "0" or run.load is None or run.save is None or (run.save / DIRECTORY).exists():
        return
    if is_huggingface(run.load):
        write_native_assets(run.save / DIRECTORY, open_hf(run.load, without_mtp=False)[1])
    elif (run.load / DIRECTORY).is_dir():
        shutil.copytree(run.load / DIRECTORY, run.save / DIRECTORY)


def export_hf(run: RunSettings, rank: int, world_size: int) -> None:
    """Write --save-hf from the last checkpoint of --save. Every rank calls it and writes its share of the files."""
    source, assets = open_native(run.save, without_mtp=False)
    target = hf_target(source, assets, run.save_hf, torch.bfloat16 if run.bf16 else None, _SHARD_BYTES)
    convert(source, target, Share(1, rank, world_size, source.path.name), lambda nbytes: None, lambda text: None)
