"""What travels beside the weights: config.json in the dialect of its source, tokenizer, generation settings.

A native checkpoint keeps them in `huggingface/`, at the root of the iterations, so that an export after training finds
them; `conversion.json` there says what a config.json does not: whether the MTP modules' copies of embedding and head
were in the files, and the ids of the tokenizer if it is not the one that the source came with.
"""

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.tokenizer_files import TokenIds, write_template
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture import hf_config, hf_rope
from megatron_deepseek.model.architecture.config import ModelConfig

DIRECTORY = "huggingface"
_NOTES = "conversion.json"
_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "LICENSE*")
_OWN = ("config.json", _NOTES)
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}  # V3's and R1's generation_config.json
_IDS = ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Assets:
    """`fields`: the source's config.json, or None for a model that was never in this form.

    `tokens`: the ids of a tokenizer that `fields` know nothing of, and which are to be written; None where they are the
    source's. `chat_template`: to be written in place of the source's.
    """

    directory: Path | None = None
    fields: dict | None = None
    mtp_copies: bool = True
    tokens: TokenIds | None = None
    chat_template: str | None = None

    def files(self) -> list[Path]:
        """Tokenizer, generation_config.json, the model's own code: everything small that is carried as it is."""
        if self.directory is None:
            return []
        found = {path for pattern in _CARRIED for path in self.directory.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name not in _OWN and not path.name.endswith(".index.json"))


def read_assets(directory: Path) -> Assets:
    """Of a Hugging Face directory, or of one that `write_native_assets` made; empty where there is none."""
    if not directory.is_dir():
        return Assets()
    config, notes = directory / "config.json", directory / _NOTES
    given = dict(read_object(config).fields) if config.is_file() else None
    if not notes.is_file():
        return Assets(directory, given)
    noted = read_object(notes)
    tokens = noted.object("tokens", default=None)
    return Assets(directory, given, noted.boolean("mtp_copies"), tokens and TokenIds.of_fields(tokens))


def write_native_assets(directory: Path, assets: Assets, config: ModelConfig) -> None:
    """Beside weights of the architecture `config`, which config.json then says, in the dialect of its source."""
    directory.mkdir(parents=True, exist_ok=True)
    carry(assets, directory)
    _write_json(directory / "config.json", fields_of(config, assets))
    note_tokens(directory, assets.mtp_copies, assets.tokens)


def note_tokens(directory: Path, mtp_copies: bool, tokens: TokenIds | None) -> None:
    _write_json(directory / _NOTES, {"mtp_copies": mtp_copies} | ({"tokens": tokens.as_fields()} if tokens else {}))


def carry(assets: Assets, directory: Path) -> None:
    for path in assets.files():
        shutil.copyfile(path, directory / path.name)
    if assets.chat_template is not None:
        write_template(directory, assets.chat_template)


def write_config(directory: Path, config: ModelConfig, assets: Assets, dtypes: dict[torch.dtype, int],
                 new_scales: bool = False) -> None:
    """config.json of an export whose tensors have `dtypes`, bytes of each.

    With `new_scales`, FP8 weights were quantised here, by scales of any value: V3.1's `scale_fmt` "ue8m0", powers of
    two, which servers rely on, holds for the released scales alone.
    """
    quantized = torch.float8_e4m3fn in dtypes
    widest = max((dtype for dtype in dtypes if dtype != torch.float8_e4m3fn), key=dtypes.get)
    given = fields_of(config, assets)
    given.setdefault("architectures", config.to_hf_dict()["architectures"])  # servers choose their code by it
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


def write_generation_config(directory: Path, config: ModelConfig, assets: Assets) -> None:
    """generation_config.json of an export: what was carried there, with the ids that belong to the tokenizer.

    Where nothing was, ids and the sampling that V3 and R1 are released with, for models of their kind.
    """
    path = directory / "generation_config.json"
    if path.is_file():
        if assets.tokens is not None:
            _write_json(path, dict(read_object(path).fields) | assets.tokens.as_fields())
        return
    given = assets.tokens.as_fields() if assets.tokens is not None else fields_of(config, assets)
    ids = {name: given.get(name) for name in (*_IDS, "pad_token_id") if given.get(name) is not None}
    _write_json(path, ids | (_SAMPLING if config.model_type == "deepseek_v3" else {}))


def fields_of(config: ModelConfig, assets: Assets) -> dict:
    """config.json for `config`: the source's, with what is different now."""
    given = config.to_hf_dict() if assets.fields is None else assets.fields | _changes(assets.fields, config)
    tokens = assets.tokens
    if tokens is not None:
        given |= {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
        if "pad_token_id" in given or tokens.pad_token_id != tokens.eos_token_id:  # an embedding of padding is frozen
            given["pad_token_id"] = tokens.pad_token_id
    elif assets.fields is None:  # the preset's ids are of a vocabulary that this model may not have
        given |= {name: None for name in _IDS if (given[name] or 0) >= config.vocab_size}
    return given


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
