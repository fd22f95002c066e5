"""The tokenizer of a GGUF file, read from a tokenizer.json.

llama.cpp has its own byte-level BPE: it takes tokens and merges from the file, but how a text is cut before bytes are
merged it knows by a name alone. That name is found by the expressions of tokenizer.json (data/text_splits.py), else by
how released tokenizers cut one text. One of another kind is refused: some texts would get other tokens than in
training.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers.pre_tokenizers import ByteLevel

from megatron_deepseek.checkpoint.convert.tokenizer_files import CONFIG, JSON, TEMPLATE, read_token_ids, tokenizer_in
from megatron_deepseek.data.text_splits import DEEPSEEK_V3, LLAMA3, QWEN2
from megatron_deepseek.data.tokenizer import HuggingFaceTokenizer
from megatron_deepseek.foreign_json import read_object

# The names in llama.cpp of ways to cut a text: by the expressions, in order.
_BY_SPLITS = {DEEPSEEK_V3: "deepseek-v3", QWEN2: "qwen2", LLAMA3: "llama-bpe"}
_GPT2 = "gpt-2"  # what the library's own step ByteLevel cuts by
# The same by the ids that a released tokenizer gives llama.cpp's test string: what its own converter goes by.
_TEST_STRING = (
    '\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 '
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL")
_BY_HASH = {"049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
            "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder"}
# llama.cpp wants a list of merges. No byte is written as this character: the merge is never made.
_NO_MERGES = ("一 一",)


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE. `types` are gguf.TokenType's values of the `tokens`, by id; `merges` go from first to last.

    `pre_tokenizer` is llama.cpp's name of how a text is cut. `adds_bos`: whether a prompt begins with `bos`.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre_tokenizer: str
    bos: int | None
    eos: int
    pad: int
    adds_bos: bool
    chat_template: str | None


def read_vocabulary(directory: Path, pre_tokenizer: str | None, chat_template: str | None) -> Vocabulary:
    """Read the tokenizer.json of `directory`, and what is beside it.

    `pre_tokenizer` and `chat_template` replace what the files say. Raise ValueError if there is none, or one that is no
    byte-level BPE, or that cuts texts in a way for which llama.cpp has no name.
    """
    tokenizer = tokenizer_in(directory)
    if tokenizer is None:
        raise ValueError(f"--to gguf: {directory} has no {JSON}, without which llama.cpp does not even answer ids: "
                         "--assets DIR brings one")
    ids = read_token_ids(directory)
    fields = json.loads(tokenizer.backend.to_str())
    model = fields["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not set(ByteLevel.alphabet()) <= set(model["vocab"]):
        raise ValueError(f"--to gguf: {directory / JSON} is no byte-level BPE, and no other kind is written here")
    merges = tuple(" ".join(pair) for pair in model["merges"])
    tokens, types = _entries(tokenizer)
    name = pre_tokenizer or _name_of(tokenizer, fields, directory)
    return Vocabulary(tokens, types, merges or _NO_MERGES, name, ids.bos_token_id, ids.eos_token_id, ids.pad_token_id,
                      tokenizer.adds_bos, chat_template or _template_in(directory))


def _entries(tokenizer: HuggingFaceTokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return text and type of each id; an id without an entry is unused."""
    texts = {identity: text for text, identity in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.backend.get_added_tokens_decoder()

    def kind(identity: int) -> int:
        if identity not in texts:
            return TokenType.UNUSED
        if identity not in added:
            return TokenType.NORMAL
        return TokenType.CONTROL if added[identity].special or _looks_special(texts[identity]) else \
            TokenType.USER_DEFINED

    ids = range(tokenizer.vocab_size)
    return tuple(texts.get(identity, f"[PAD{identity}]") for identity in ids), tuple(map(kind, ids))


def _looks_special(text: str) -> bool:
    """Return whether a token is written as those of roles are, which some files do not mark as special."""
    return text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>"))


def _name_of(tokenizer: HuggingFaceTokenizer, fields: dict[str, Any], directory: Path) -> str:
    splits, rest = _splits(fields["pre_tokenizer"])
    if not fields["model"]["merges"]:
        return _GPT2  # every byte stays by itself, however a text is cut
    if rest is not None and rest["type"] == "ByteLevel" and not rest["add_prefix_space"]:
        if splits in _BY_SPLITS and not rest["use_regex"]:
            return _BY_SPLITS[splits]
        if not splits and rest["use_regex"]:
            return _GPT2
    ids = tokenizer.encode(_TEST_STRING)
    for begin in ([], [tokenizer.bos]):
        name = _BY_HASH.get(hashlib.sha256(str(begin + ids).encode()).hexdigest())
        if name is not None:
            return name
    raise ValueError(f"--to gguf: {directory / JSON} cuts texts in a way for which llama.cpp has no known name: some "
                     "texts would get other tokens there; --gguf-pre-tokenizer NAME takes one of its names anyway")


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """Return the expressions by which a text is cut, and the step after them, None if there are further ones."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or ([pre_tokenizer] if pre_tokenizer else [])
    splits = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split" and step["behavior"] == "Isolated"
              and not step["invert"] and "Regex" in step["pattern"]]
    rest = steps[len(splits):]
    return tuple(splits), rest[0] if len(rest) == 1 else None


def _template_in(directory: Path) -> str | None:
    if (directory / TEMPLATE).is_file():
        return (directory / TEMPLATE).read_text(encoding="utf-8")
    if not (directory / CONFIG).is_file():
        return None
    template = read_object(directory / CONFIG).fields.get("chat_template")
    return template if isinstance(template, str) else None
