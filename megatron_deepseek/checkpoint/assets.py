"""What travels beside the weights: config.json in the dialect of its source, tokenizer, generation settings.

A native checkpoint keeps them in `huggingface/`, at the root of the iterations, so that an export after training finds
them; `conversion.json` there says what a config.json does not: whether the MTP modules and their copies of embedding
and head were in the files.
"""

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from megatron_deepseek import hf_config, hf_rope
from megatron_deepseek.checkpoint import block_fp8
from megatron_deepseek.config import ModelConfig
from megatron_deepseek.foreign_json import read_object

DIRECTORY = "huggingface"
_NOTES = "conversion.json"
_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "LICENSE*")
_OWN = ("config.json", _NOTES)


@dataclass(frozen=True)
class Assets:
    """`fields`: the source's config.json, or None for a model that was never in this form."""

    directory: Path | None = None
    fields: dict | None = None
    mtp_copies: bool = True

    def files(self) -> list[Path]:
        """Tokenizer, generation_config.json, the model's own code: everything small that is carried as it is."""
        if self.directory is None:
            return []
        found = {path for pattern in _CARRIED for path in self.directory.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name not in _OWN and not path.name.endswith(".index.json"))


def read_assets(directory: Path) -> Assets:
    """Of a Hugging Face directory, or of one that `write_native_assets` made; empty where there is none."""
    if not (directory / "config.json").is_file():
        return Assets(directory) if directory.is_dir() else Assets()
    given = dict(read_object(directory / "config.json").fields)
    notes = directory / _NOTES
    copies = read_object(notes).boolean("mtp_copies") if notes.is_file() else True
    return Assets(directory, given, copies)


def write_native_assets(directory: Path, assets: Assets, config: ModelConfig) -> None:
    """Beside weights of the architecture `config`, which config.json then says, in the dialect of its source."""
    directory.mkdir(parents=True, exist_ok=True)
    carry(assets, directory)
    _write_json(directory / "config.json", fields_of(config, assets))
    _write_json(directory / _NOTES, {"mtp_copies": assets.mtp_copies})


def carry(assets: Assets, directory: Path) -> None:
    for path in assets.files():
        shutil.copyfile(path, directory / path.name)


def write_config(directory: Path, config: ModelConfig, assets: Assets, dtypes: dict[torch.dtype, int],
                 new_scales: bool = False) -> None:
    """config.json of an export whose tensors have `dtypes`, bytes of each.

    With `new_scales`, FP8 weights were quantised here, by scales of any value: V3.1's `scale_fmt` "ue8m0", powers of
    two, which servers rely on, holds for the released scales alone.
    """
    quantized = torch.float8_e4m3fn in dtypes
    widest = max((dtype for dtype in dtypes if dtype != torch.float8_e4m3fn), key=dtypes.get)
    given = fields_of(config, assets)
    key = "dtype" if "dtype" in given and "torch_dtype" not in given else "torch_dtype"
    given[key] = str(widest).removeprefix("torch.")
    if not quantized:
        given.pop("quantization_config", None)
    elif not given.get("quantization_config"):
        given["quantization_config"] = block_fp8.QUANTIZATION_CONFIG
    elif new_scales:
        given["quantization_config"] = {key: value for key, value in given["quantization_config"].items()
                                        if key != "scale_fmt"}
    _write_json(directory / "config.json", given)


def fields_of(config: ModelConfig, assets: Assets) -> dict:
    """config.json for `config`: the source's, with what is different now."""
    given = assets.fields
    return config.to_hf_dict() if given is None else given | _changes(given, config)


def _changes(given: dict, config: ModelConfig) -> dict:
    """What training or conversion changed since `given` was read, in its own dialect."""
    theirs, changes = ModelConfig.from_hf_dict(given), {}
    released = config.to_hf_dict()
    names = [field.name for field in fields(config) if getattr(theirs, field.name) != getattr(config, field.name)]
    for name in names:
        if name not in ("rope_theta", "rope_scaling"):
            changes[hf_config.spelling(given, name)] = released[name]
    if given.get("topk_method") == hf_config.MISSPELT_GREEDY:  # which neither DeepSeek's code nor transformers runs
        changes["topk_method"] = config.topk_method
    if {"rope_theta", "rope_scaling"} & set(names):
        changes |= hf_rope.write_rope(config, given)
    return changes


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
