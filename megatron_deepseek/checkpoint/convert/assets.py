"""What goes with the weights between formats: config.json in its source's dialect, tokenizer, generation settings.

Checkpoints of training keep them in `huggingface/`, beside the iterations, so that an export after training finds them.
`conversion.json` there says what a config.json does not: whether the MTP modules' copies of embedding and head were in
the files, the ids of the tokenizer if it is not the one that the source came with, and how many rows of the embedding
are those of the vocabulary if it was padded.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.tokenizer_files import TokenIds, write_template
from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture import hf_config, hf_rope, hf_window
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.fields import RULES

DIRECTORY = "huggingface"
_NOTES = "conversion.json"
_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "LICENSE*")
_OWN = ("config.json", _NOTES)
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}  # V3's and R1's generation_config.json
_IDS = ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Assets:
    """What to write beside the weights.

    `directory` holds the files to copy. `fields` is the source's config.json, None for a model that never had one from
    Hugging Face. `mtp_copies` says whether to write the MTP modules' copies of embedding and head. `tokens` are the ids
    of a tokenizer that is not the one of `fields`, None if it is. `chat_template` replaces the source's.
    `vocab_size`: the rows of the embedding that are written, None for all.
    """

    directory: Path | None = None
    fields: dict | None = None
    mtp_copies: bool = True
    tokens: TokenIds | None = None
    chat_template: str | None = None
    vocab_size: int | None = None

    def files(self) -> list[Path]:
        """List the files that are copied as they are: tokenizer, generation_config.json, the model's own code."""
        if self.directory is None:
            return []
        found = {path for pattern in _CARRIED for path in self.directory.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name not in _OWN and not path.name.endswith(".index.json"))


def read_assets(directory: Path) -> Assets:
    """Read a Hugging Face directory, or one that `write_native_assets` made; return empty assets if there is none."""
    if not directory.is_dir():
        return Assets()
    config, notes = directory / "config.json", directory / _NOTES
    given = dict(read_object(config).fields) if config.is_file() else None
    if not notes.is_file():
        return Assets(directory, given)
    noted = read_object(notes)
    tokens = noted.object("tokens", default=None)
    return Assets(directory, given, noted.boolean("mtp_copies"), tokens and TokenIds.of_fields(tokens),
                  vocab_size=noted.integer("vocab_size", default=None))


def write_native_assets(directory: Path, assets: Assets, config: ModelConfig) -> None:
    """Write the directory that goes with native checkpoints; its config.json says the architecture `config`.

    config.json keeps the dialect of its source.
    """
    directory.mkdir(parents=True, exist_ok=True)
    carry(assets, directory)
    _write_json(directory / "config.json", fields_of(config, assets))
    note_tokens(directory, assets.mtp_copies, assets.tokens)


def note_tokens(directory: Path, mtp_copies: bool, tokens: TokenIds | None, vocab_size: int | None = None) -> None:
    """Write conversion.json."""
    _write_json(directory / _NOTES, {"mtp_copies": mtp_copies} | ({"tokens": tokens.as_fields()} if tokens else {})
                | ({} if vocab_size is None else {"vocab_size": vocab_size}))


def carry(assets: Assets, directory: Path) -> None:
    """Copy the files of `assets` to `directory`, with its chat template if it has one."""
    for path in assets.files():
        shutil.copyfile(path, directory / path.name)
    if assets.chat_template is not None:
        write_template(directory, assets.chat_template)


def write_config(directory: Path, config: ModelConfig, assets: Assets, dtypes: dict[torch.dtype, int],
                 scale_format: str | None = None) -> None:
    """Write config.json of an export; `dtypes` maps the dtypes of its tensors to their bytes.

    `scale_format` is that of the scales of FP8 weights that were quantised here, None where all came with the source.
    Then `scale_fmt` says it: V3.1's "ue8m0" promises powers of two, on which servers rely.
    """
    quantized = torch.float8_e4m3fn in dtypes
    widest = max((dtype for dtype in dtypes if dtype != torch.float8_e4m3fn), key=dtypes.get)
    given = fields_of(config, assets)
    given.setdefault("architectures", config.to_hf_dict()["architectures"])  # servers choose the model's code by it
    key = "dtype" if "dtype" in given and "torch_dtype" not in given else "torch_dtype"
    given[key] = str(widest).removeprefix("torch.")
    if not quantized:
        given.pop("quantization_config", None)
    else:
        quantization = given.get("quantization_config") or block_fp8.QUANTIZATION_CONFIG
        given["quantization_config"] = _with_scale_format(quantization, scale_format)
    _write_json(directory / "config.json", given)


def _with_scale_format(quantization: dict, scale_format: str | None) -> dict:
    if scale_format is None:
        return quantization
    others = {key: value for key, value in quantization.items() if key != "scale_fmt"}
    return dict(sorted((others | {"scale_fmt": scale_format}).items())) if scale_format == block_fp8.UE8M0 else others


def write_generation_config(directory: Path, config: ModelConfig, assets: Assets) -> None:
    """Write generation_config.json of an export: the one that was copied, with the ids of the tokenizer.

    If none was copied, it has the ids and, for models of V3's kind, the sampling that V3 and R1 are released with.
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
    """Return the fields of config.json for `config`: the source's, with what is different now."""
    given = config.to_hf_dict() if assets.fields is None else assets.fields | _changes(assets.fields, config)
    tokens = assets.tokens
    if tokens is not None:
        given |= {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
        if "pad_token_id" in given or tokens.pad_token_id != tokens.eos_token_id:  # transformers freezes its embedding
            given["pad_token_id"] = tokens.pad_token_id
    elif assets.fields is None:  # a preset's ids may be outside of this vocabulary
        given |= {name: None for name in _IDS if (given[name] or 0) >= config.vocab_size}
    return given


def _changes(given: dict, config: ModelConfig) -> dict:
    """Return the fields that training or conversion changed since `given` was read, in its dialect."""
    theirs, changes = ModelConfig.from_hf_dict(given), {}
    released = config.to_hf_dict()
    names = [name for name in RULES if getattr(theirs, name) != getattr(config, name)]
    for name in names:
        if name == "reward_head":
            changes |= hf_config.reward_fields(config)
        elif not RULES[name].rotary and not RULES[name].sliding:
            changes[hf_config.spelling(given, name)] = released.get(name, getattr(config, name))
    if given.get("topk_method") == hf_config.MISSPELT_GREEDY:  # neither DeepSeek's code nor transformers runs it
        changes["topk_method"] = config.topk_method
    if any(RULES[name].rotary for name in names):
        changes |= hf_rope.write_rope(config, given)
    if any(RULES[name].sliding for name in names):
        changes |= hf_window.write_window(config)
    return changes


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
