"""Exports of training (--save-hf), and keeping what they need beside the checkpoints.

Tokenizer, chat template and config.json that came with the loaded weights, or that the run was given, are kept in
`huggingface/` under --save, and go out with the trained weights.
"""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from megatron_deepseek.checkpoint.building import Share
from megatron_deepseek.checkpoint.convert.assets import DIRECTORY, note_tokens, read_assets, write_native_assets
from megatron_deepseek.checkpoint.convert.chat_templates import read_template
from megatron_deepseek.checkpoint.convert.conversion import DTYPES, convert, output_dtype
from megatron_deepseek.checkpoint.convert.formats import hf_output, open_hf, open_native
from megatron_deepseek.checkpoint.convert.huggingface import INDEX
from megatron_deepseek.checkpoint.convert.names import hf_shapes
from megatron_deepseek.checkpoint.convert.tokenizer_files import (
    JSON,
    TEMPLATE,
    holds_tokenizer,
    replace_tokenizer,
    tokenizer_to_keep,
    write_template,
)
from megatron_deepseek.checkpoint.integrity import checksum_file, read_checksums
from megatron_deepseek.checkpoint.publishing import check_writable
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.data.tokenizer import find_tokenizer_json
from megatron_deepseek.foreign_json import LARGEST_LIST, read_object
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.settings import DataSettings, RunSettings

_FILE_BYTES = 5 * 10**9


def keep_assets(loaded: Path | None, save: Path) -> None:
    """Copy config.json, tokenizer and the like of what a run began from to `huggingface/` under --save.

    `loaded` is a Hugging Face directory or one iteration's. The copy is whole from the moment it has its name.
    """
    if loaded is None or (save / DIRECTORY).exists():
        return
    aside = save / f"{DIRECTORY}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    if is_huggingface(loaded):
        source, assets = open_hf(loaded, without_mtp=False)
        write_native_assets(aside, assets, source.config)
    elif (loaded.parent / DIRECTORY).is_dir():
        shutil.copytree(loaded.parent / DIRECTORY, aside)
    else:
        return
    os.rename(aside, save / DIRECTORY)


def keep_model_file(save: Path, model_file: Path | None, config: ModelConfig) -> None:
    """Keep the config.json that --model named, for a run that began from no released weights; after `keep_assets`.

    Exports are then written in its dialect, with the fields that have no meaning here.
    """
    if model_file is None or (save / DIRECTORY / "config.json").exists():
        return
    fields = dict(read_object(model_file).fields)
    write_native_assets(save / DIRECTORY, replace(read_assets(save / DIRECTORY), directory=None, fields=fields), config)


def keep_tokenizer(save: Path, data: DataSettings, chat_template: str | None = None) -> None:
    """Keep the tokenizer of the data, and --chat-template, with the checkpoints of --save; after `keep_assets`.

    A tokenizer that is there already stays as it is, with the files that came with the loaded weights. It stays with
    the NullTokenizer too, which says where documents end in data that is ids already, but not what made the ids.
    """
    directory = save / DIRECTORY
    if not _is_kept(directory, data):
        files, tokens = tokenizer_to_keep(data.tokenizer_type, data.tokenizer_model)
        there = read_assets(directory)
        if tokens is not None and (files or (tokens != there.tokens and not holds_tokenizer(directory))):
            directory.mkdir(parents=True, exist_ok=True)
            note_tokens(directory, there.mtp_copies, tokens, there.vocab_size)
            replace_tokenizer(directory, files)
    template = None if chat_template is None else read_template(chat_template)
    if template is not None and not _holds(directory / TEMPLATE, template.encode()):
        write_template(directory, template)


def keep_vocab_size(save: Path, vocab_size: int | None) -> None:
    """Keep how many rows of a padded embedding an export has, None for all of them; after `keep_tokenizer`."""
    directory = save / DIRECTORY
    there = read_assets(directory)
    if vocab_size is not None and there.vocab_size != vocab_size:
        directory.mkdir(parents=True, exist_ok=True)
        note_tokens(directory, there.mtp_copies, there.tokens, vocab_size)


def _is_kept(directory: Path, data: DataSettings) -> bool:
    """Return whether the tokenizer is there, without parsing it, since every save asks."""
    if data.tokenizer_type == "HuggingFaceTokenizer" and data.tokenizer_model is not None:
        return _holds(directory / JSON, find_tokenizer_json(data.tokenizer_model).read_bytes())
    if data.tokenizer_type == "ByteTokenizer":
        return _holds(directory / JSON, tokenizer_to_keep(data.tokenizer_type, None)[0][JSON])
    return False


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


def check_export(run: RunSettings, config: ModelConfig, finished: Path | None = None) -> None:
    """Raise ValueError if the export of `run` could not be written now; called at the start of a run.

    `finished` is the checkpoint to export if nothing is left to train; its export may be there already.
    """
    save_hf = run.save_hf
    if save_hf.exists() and (not save_hf.is_dir() or any(save_hf.iterdir())):
        if finished is not None and is_exported(run, finished):
            return
        raise ValueError(f"--save-hf {save_hf} exists already and is not empty")
    place = check_writable("--save-hf", save_hf)
    needed = sum(prod(shape) * output_dtype(name, torch.float32, _dtype(run)).itemsize
                 for name, shape in hf_shapes(config).items())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(f"--save-hf {save_hf}: the export will take {needed:,} bytes, {free:,} are free there")


def is_exported(run: RunSettings, checkpoint: Path) -> bool:
    """Return whether --save-hf of `run` is a finished export of that very checkpoint.

    Exports get their name once they are whole, so one that is there is finished.
    """
    try:
        wanted = _origin(checkpoint, run)
        found = read_object(run.save_hf / INDEX, LARGEST_LIST).object("metadata").fields.get("exported")
    except ValueError:
        return False
    return found == wanted and wanted["digest"] is not None


def export_hf(run: RunSettings, rank: int, world_size: int) -> None:
    """Write --save-hf from the last checkpoint of --save. Every rank calls it and writes its share of the files.

    Each start has a name of its own (`Share.run`): ranks of an earlier start, which was killed, may have written that
    they have finished, and must not be taken for ranks of this one.
    """
    start = [uuid4().hex]
    if world_size > 1:
        dist.broadcast_object_list(start)
    source, assets = open_native(run.save, without_mtp=False)
    origin = {"exported": _origin(source.path, run)}
    output = hf_output(source, assets, run.save_hf, _dtype(run), _FILE_BYTES, origin, run.fp8_scale_format)
    convert(source, output, Share(1, rank, world_size, start[0]), lambda nbytes: None, lambda text: None)


def _dtype(run: RunSettings) -> torch.dtype | None:
    """Return the dtype to export in, None for that of the checkpoint, whose weights are float32 masters."""
    name = run.save_hf_dtype or ("bf16" if run.bf16 else "fp32")
    return None if name == "fp32" else DTYPES[name]


def _origin(checkpoint: Path, run: RunSettings) -> dict[str, Any]:
    """Return what an export is made from, by which it is recognised; `digest` is None without checksums.json.

    Checkpoints of older versions have no checksums.json.
    """
    listing = read_checksums(checkpoint) or {}
    weights = [[name, listing[name].digest] for name in sorted(listing) if name.endswith(".distcp")]
    beside = [[path.name, checksum_file(path).digest] for path in read_assets(checkpoint.parent / DIRECTORY).files()]
    digest = hashlib.sha256(json.dumps([weights, beside]).encode()).hexdigest()
    fp8 = {"fp8_scale_format": run.fp8_scale_format} if run.save_hf_dtype == "fp8" else {}
    return {"checkpoint": checkpoint.name, "bf16": _dtype(run) == torch.bfloat16,
            "digest": digest if weights else None} | fp8
