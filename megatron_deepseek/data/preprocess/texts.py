"""The text of a record under one key: a string, a list of strings (sentences), or a `LongText`."""

from collections.abc import Iterator
from hashlib import blake2b

from megatron_deepseek.data.preprocess.cutting import PIECE_CHARS, slices
from megatron_deepseek.data.preprocess.long_text import LongText

Text = str | list[str] | LongText


def chars_held(text: Text) -> int:
    """Return the number of characters. For a `LongText`, which is not read, it is more than any batch takes."""
    if isinstance(text, LongText):
        return PIECE_CHARS + 1
    return len(text) if isinstance(text, str) else sum(map(len, text))


def strings(text: Text) -> list[str]:
    """Return the strings that are in memory: none of a `LongText`."""
    return [text] if isinstance(text, str) else text if isinstance(text, list) else []


def pieces(text: Text) -> Iterator[str]:
    """Return all of the text as strings of bounded size."""
    if isinstance(text, LongText):
        return text.pieces()
    return (piece for string in strings(text) for piece in slices(string))


def rejoined(parts: Iterator[str], size: int) -> Iterator[str]:
    """Yield the same text in pieces of exactly `size` characters and a last one."""
    held = ""
    for part in parts:
        held += part
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    yield held


def hash_of(texts: tuple[Text, ...]) -> tuple[int, int]:
    """Return a hash of 128 bits, in halves, of a document's texts and the borders between them."""
    digest = blake2b(digest_size=16)
    for text in texts:
        for string in text if isinstance(text, list) else [text]:
            size = 0
            for piece in pieces(string):
                content = piece.encode()
                digest.update(content)
                size += len(content)
            digest.update(size.to_bytes(8, "little") + b"\xff")
        digest.update(b"\xfe")
    value = int.from_bytes(digest.digest(), "little")
    return value >> 64, value & (1 << 64) - 1
