"""The perplexity of a file: how well a model predicts its documents, by token, byte and word.

Each document is by itself, after the token that begins one (or ends the one before). One that is longer than the model
sees is read in rolling windows (windows.py). Words are what lies between blanks, as in lm-eval's word_perplexity; bytes
are those of UTF-8.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.inspection import read_documents
from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.evaluation.questions import EvaluatedModel
from megatron_deepseek.evaluation.windows import rolling_windows
from megatron_deepseek.foreign_json import JsonObject, parse_json

_WINDOWS = 512  # that are asked at a time: memory holds no more of a file


@dataclass(frozen=True)
class Document:
    """A document of a file: its ids, and how many bytes and words its text has."""

    tokens: tuple[int, ...]
    num_bytes: int
    num_words: int


@dataclass(frozen=True)
class Perplexity:
    """The sum of log p over all tokens of a file, in nats, and what it is divided by."""

    log_probability: float
    documents: int
    tokens: int
    bytes: int
    words: int

    def record(self) -> dict[str, float]:
        """Return the counts and means by the names of lm-eval's metrics; bits_per_byte is in bits."""
        loss = -self.log_probability
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "words": self.words,
                "log_likelihood": self.log_probability, "loss": loss / self.tokens,
                "token_perplexity": _exp(loss / self.tokens), "byte_perplexity": _exp(loss / self.bytes),
                "word_perplexity": _exp(loss / self.words), "bits_per_byte": loss / self.bytes / math.log(2)}


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def perplexity_of(model: EvaluatedModel, path: Path, stride: int | None = None, key: str = "text",
                  advance: Callable[[int], None] = lambda tokens: None) -> Perplexity:
    """Return the perplexity of a file. `stride`: of windows, None for as long as the model sees.

    `key`: of a JSONL file's texts. `advance` is told how many tokens were scored.

    Raise ValueError, of one line, for a file that cannot be read or holds no token, and for an impossible stride.
    """
    prefix = model.tokenizer.eod if model.tokenizer.bos is None else model.tokenizer.bos
    counts = [0, 0, 0, 0]

    def windows() -> Iterator:
        for document in documents_of(path, model.tokenizer, key):
            tokens = document.tokens[1:] if document.tokens[:1] == (prefix,) else document.tokens
            for place, more in enumerate((1, len(tokens), document.num_bytes, document.num_words)):
                counts[place] += more
            yield from rolling_windows(tokens, prefix, model.max_length, stride or model.max_length)

    total, rest = 0.0, windows()
    while some := list(islice(rest, _WINDOWS)):
        for number, answer in model.answers(some):
            total += answer.log_probability
            advance(len(some[number].text))
    documents, tokens, num_bytes, words = counts
    if not tokens:
        raise ValueError(f"--perplexity {path} has no text")
    return Perplexity(total, documents, tokens, max(num_bytes, 1), max(words, 1))


def documents_of(path: Path, tokenizer: Tokenizer, key: str = "text") -> Iterator[Document]:
    """Yield the documents of a file.

    Those of an indexed dataset (its .bin, .idx or prefix), of JSONL each line's `key`, of another file the whole.
    """
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if prefix.with_name(prefix.name + ".idx").is_file():
        index = open_index(str(prefix), "--perplexity")
        for document in read_documents(index, 0, index.num_document_entries - 1, 2**31):
            ids = document.ids.tolist()
            wrong = next((each for each in ids if not 0 <= each < tokenizer.vocab_size), None)
            if wrong is not None:
                raise ValueError(f"--perplexity {path} has the id {wrong}, and the tokenizer has ids below "
                                 f"{tokenizer.vocab_size}: it was made with another one")
            yield _document(ids, tokenizer.decode(ids, special_tokens=False))
        return
    for text in _texts(path, key):
        yield _document(tokenizer.encode(text), text)


def _document(ids: list[int], text: str) -> Document:
    return Document(tuple(ids), len(text.encode(errors="replace")), len(text.split()))


def _texts(path: Path, key: str) -> Iterator[str]:
    """Yield the texts of a JSONL file, or the whole of another one; raise ValueError that names where a fault is."""
    if path.suffix not in (".jsonl", ".json"):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--perplexity {path} is not UTF-8: byte {error.start}") from error
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"--perplexity {path}, line {number}"
                yield JsonObject.of(parse_json(line, where), where).text(key)
