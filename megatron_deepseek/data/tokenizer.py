"""Tokenizers: text to ids and back, by Megatron-LM's names of the types.

HuggingFaceTokenizer  a tokenizer.json, or a directory that holds one (the `tokenizers` library; no transformers needed)
ByteTokenizer         the 256 bytes and DeepSeek's special tokens; needs no file
NullTokenizer         text that is already ids ("17 4 99"), for synthetic data

None of them adds special tokens to a text by itself: whoever builds a dataset says where a document ends.
"""

from pathlib import Path
from typing import Protocol

from megatron_deepseek.foreign_json import read_object

BOS = "<｜begin▁of▁sentence｜>"
EOD = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOD, USER, ASSISTANT)

# The names that the released tokenizers of other families have for them, looked for in this order after DeepSeek's.
OTHER_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eod>", "<eos>", "<|im_end|>", "[EOS]")
OTHER_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")

# Begin, hole and end of a document that is filled in the middle: DeepSeek's, then those of other families.
FIM_TOKENS = (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
              ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
              ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))


class IdOutsideVocabulary(ValueError):
    """An id that no model with this vocabulary has an embedding for."""


class Tokenizer(Protocol):
    """Turns text into ids and back. `vocab_size` is the highest id + 1.

    `eod` ends a document; `bos` begins one, and is None where there is no such token. `fim` are the ids of FIM_TOKENS'
    begin, hole and end, or None. `adds_bos` says whether a prompt is to begin with `bos`, as transformers lets it;
    `encode` never adds it.
    """

    vocab_size: int
    eod: int
    bos: int | None
    adds_bos: bool
    fim: tuple[int, int, int] | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int], special_tokens: bool = True) -> str:
        """Return the text of `ids`; an id without an entry gives nothing.

        Special tokens are as they are written, or left out.
        """


class HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json. eod and bos are those of the tokenizer_config.json beside it, or well-known.

    Ids are those of Megatron-LM's tokenizer of this name: no special tokens are added, and one that is written out in
    a text is read as that special token. Truncation and padding that tokenizer.json may ask for are off: they are for
    models that read sentences, and would silently cut documents.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Backend
        self.path = path
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for whatever it cannot read
            raise ValueError(f"--tokenizer-model {path} is not a readable tokenizer.json: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod = self._find("eos_token", (EOD, *OTHER_EOD))
        self.bos = self._find("bos_token", (BOS, *OTHER_BOS))
        self.pad = self._find("pad_token", ())
        asked = _asks_for_bos(self.path.with_name("tokenizer_config.json"))
        self.adds_bos = self.bos is not None and (asked or self.backend.encode("").ids[:1] == [self.bos])
        named = (tuple(map(self.backend.token_to_id, names)) for names in FIM_TOKENS)
        self.fim = next((ids for ids in named if None not in ids), None)
        if self.eod is None:
            raise ValueError(f"--tokenizer-model {path} has no end-of-document token: none is named as eos_token in "
                             f"tokenizer_config.json, and none is called {', '.join((EOD, *OTHER_EOD))}")

    def _find(self, role: str, names) -> int | None:
        """Return the id of tokenizer_config.json's token for this role, or of the first of `names` that exists.

        Return None where neither does, and raise ValueError where the token is not in the vocabulary.
        """
        declared = _declared(self.path.with_name("tokenizer_config.json"), role)
        if declared is not None:
            identity = self.backend.token_to_id(declared)
            if identity is None:
                raise ValueError(f"{self.path.with_name('tokenizer_config.json')}: {role} {declared!r} "
                                 f"is not in the vocabulary of --tokenizer-model {self.path}")
            return identity
        identities = (self.backend.token_to_id(name) for name in names)
        return next((identity for identity in identities if identity is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=not special_tokens)


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; then come begin, end, User and Assistant, which in a text stay bytes."""

    def __init__(self):
        self.vocab_size = 256 + len(SPECIAL_TOKENS)
        self.bos = 256 + SPECIAL_TOKENS.index(BOS)
        self.eod = 256 + SPECIAL_TOKENS.index(EOD)
        self.fim, self.adds_bos = None, False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int], special_tokens: bool = True) -> str:
        end = self.vocab_size if special_tokens else 256
        spelled = (bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids if i < end)
        return b"".join(spelled).decode(errors="replace")


class NullTokenizer:
    """Reads text that is already ids. As in Megatron-LM, eod is `num_ids` itself, so vocab_size is one more."""

    def __init__(self, num_ids: int):
        self.vocab_size = num_ids + 1
        self.eod = num_ids
        self.bos = self.fim = None
        self.adds_bos = False

    def encode(self, text: str) -> list[int]:
        ids = [int(word) for word in text.split()]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise IdOutsideVocabulary(f"NullTokenizer: ids from {min(ids)} to {max(ids)}, "
                                      f"not in [0, {self.vocab_size})")
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int], special_tokens: bool = True) -> str:
        return " ".join(str(each) for each in ids if special_tokens or each != self.eod)


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | None = None) -> Tokenizer:
    """Return the tokenizer of `--tokenizer-type` and `--tokenizer-model` (for NullTokenizer the number of ids)."""
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(find_tokenizer_json(tokenizer_model))
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    if tokenizer_type == "NullTokenizer":
        if tokenizer_model is None or not tokenizer_model.isdigit() or int(tokenizer_model) < 1:
            raise ValueError(f"--tokenizer-model {tokenizer_model}: NullTokenizer needs its number of ids there")
        return NullTokenizer(int(tokenizer_model))
    raise ValueError(f"--tokenizer-type {tokenizer_type} is not one of "
                     f"HuggingFaceTokenizer, ByteTokenizer, NullTokenizer")


def find_tokenizer_json(tokenizer_model: str | None) -> Path:
    if tokenizer_model is None:
        raise ValueError("--tokenizer-model is missing: HuggingFaceTokenizer needs a tokenizer.json, or its directory")
    path = Path(tokenizer_model)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--tokenizer-model {tokenizer_model}: there is no file {path}")
    return path


def _declared(path: Path, role: str) -> str | None:
    """Return the token that a tokenizer_config.json gives a role (a text, or an object with its content), else None."""
    if not path.is_file():
        return None
    config = read_object(path)
    if isinstance(config.fields.get(role), dict):
        return config.object(role).text("content", default=None)
    return config.text(role, default=None)


def _asks_for_bos(path: Path) -> bool:
    return path.is_file() and read_object(path).boolean("add_bos_token", default=None) is True
