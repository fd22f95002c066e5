"""The tokenizer that belongs to the weights: the files kept beside them, and the ids that config.json takes from it.

A tokenizer.json that has no tokenizer_config.json beside it (Megatron-LM asks for none) gets one, so that transformers
reads the ids that training had. The ByteTokenizer is written as what it is, a byte-level BPE without merges.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_deepseek.checkpoint.convert.chat_templates import needed_tokens, read_template
from megatron_deepseek.data.tokenizer import (
    BOS,
    EOD,
    SPECIAL_TOKENS,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    build_tokenizer,
    find_tokenizer_json,
)
from megatron_deepseek.foreign_json import JsonObject, read_object

JSON, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_FILES = (JSON, CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "tokenizer.model")


@dataclass(frozen=True)
class TokenIds:
    """The ids of special tokens, named as in config.json and generation_config.json.

    A tokenizer without a padding token pads with the end's, as the released models do.
    """

    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int

    def as_fields(self) -> dict:
        return asdict(self)

    @classmethod
    def of_fields(cls, fields: JsonObject) -> "TokenIds":
        bos = None if fields.fields.get("bos_token_id") is None else fields.integer("bos_token_id")
        return cls(bos, fields.integer("eos_token_id"), fields.integer("pad_token_id"))


def read_token_ids(directory: Path) -> TokenIds | None:
    """Read the ids of the tokenizer.json in `directory`; None without one, or if it does not say which token ends."""
    try:
        tokenizer = tokenizer_in(directory)
    except ValueError:
        return None
    return tokenizer and _ids(tokenizer)


def tokenizer_to_keep(tokenizer_type: str, tokenizer_model: str | None) -> tuple[dict[str, bytes], TokenIds | None]:
    """Return the files, by name, and the ids of the tokenizer of --tokenizer-type and --tokenizer-model.

    The NullTokenizer has ids, but no files. The ids are None if no tokenizer is given. Raise ValueError if it cannot be
    read.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        return ({}, None) if tokenizer_model is None else _files_of(find_tokenizer_json(tokenizer_model))
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model)
    files = {JSON: _bytes_as_bpe(), CONFIG: _config(BOS, EOD)} if tokenizer_type == "ByteTokenizer" else {}
    return files, TokenIds(tokenizer.bos, tokenizer.eod, tokenizer.eod)


def replace_tokenizer(directory: Path, files: dict[str, bytes]) -> None:
    """Replace another tokenizer's files by `files`. tokenizer.json is written last: once it is there, all are."""
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == JSON):
        (directory / name).write_bytes(files[name])


def holds_tokenizer(directory: Path) -> bool:
    """Return whether a tokenizer that encodes texts is there, in any of the usual forms."""
    return any((directory / name).is_file() for name in (JSON, "vocab.json", "tokenizer.model"))


def _files_of(file: Path) -> tuple[dict[str, bytes], TokenIds]:
    tokenizer = HuggingFaceTokenizer(file)
    files = {name: file.with_name(name).read_bytes() for name in _FILES[1:] if file.with_name(name).is_file()}
    if CONFIG not in files:
        named = (None if token is None else tokenizer.backend.id_to_token(token)
                 for token in (tokenizer.bos, tokenizer.eod))
        files[CONFIG] = _config(*named)
    return files | {JSON: file.read_bytes()}, _ids(tokenizer)


def write_template(directory: Path, template: str) -> None:
    """Write chat_template.jinja, and remove the template in tokenizer_config.json, which older programs would take."""
    (directory / TEMPLATE).write_text(template, encoding="utf-8")
    if (directory / CONFIG).is_file():
        fields = dict(read_object(directory / CONFIG).fields)
        if fields.pop("chat_template", None) is not None:
            (directory / CONFIG).write_text(_json(fields), encoding="utf-8")


def check_template(name: str, tokenizer: Tokenizer | None, where: object) -> str:
    """Return the text of the template `name`.

    Raise ValueError if `tokenizer`, found at `where`, lacks a token that the template writes.
    """
    template, needed = read_template(name), needed_tokens(name)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        missing = [token for token in needed if tokenizer.backend.token_to_id(token) is None]
    elif isinstance(tokenizer, ByteTokenizer):
        missing = [token for token in needed if token not in SPECIAL_TOKENS]
    else:
        raise ValueError(f"--chat-template {name} needs a tokenizer of texts, which {where} has not")
    if missing:
        raise ValueError(f"--chat-template {name} writes {missing[0]}, which is no token of {where}")
    return template


def tokenizer_in(directory: Path) -> HuggingFaceTokenizer | None:
    return HuggingFaceTokenizer(directory / JSON) if (directory / JSON).is_file() else None


def _ids(tokenizer: HuggingFaceTokenizer) -> TokenIds:
    return TokenIds(tokenizer.bos, tokenizer.eod, tokenizer.eod if tokenizer.pad is None else tokenizer.pad)


def _config(bos: str | None, eos: str) -> bytes:
    fields = {"add_bos_token": False, "add_eos_token": False, "bos_token": bos, "clean_up_tokenization_spaces": False,
              "eos_token": eos, "pad_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    return _json(fields).encode()


def _json(fields: dict) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _bytes_as_bpe() -> bytes:
    """Return the ByteTokenizer as a tokenizer.json, in which each byte is a printable character, as GPT-2 has it."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return backend.to_str().encode()
