"""Encoding of texts of any length in bounded memory: in pieces that have the same ids as the whole.

A library holds tens to hundreds of bytes for each character that it encodes at once. Between two words that no merge
joins, the ids of both sides are those of the whole. Which places these are depends on the tokenizer, so each place is
tried: the text around it must have the same ids in one piece and in two.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from megatron_deepseek.data.preprocess.encoders import Encoder
from megatron_deepseek.data.preprocess.long_text import BadDocument

PIECE_CHARS = 1 << 20
MOST_UNCUT_CHARS = 1 << 22
CONTEXT_CHARS = 256
SEARCHED_CHARS = 1 << 16
MOST_TRIED = 64

# Likely places: the beginning of a line, a blank between words, the end of a clause in Chinese or Japanese.
LIKELY = re.compile(r"(?<=\n)(?=\S)|(?<=\w)(?= \w)|(?<=[，。！？；：、])(?=\w)")


def encode_pieces(encoder: Encoder, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the ids of the text that `pieces` join to. Raise BadDocument where it cannot be cut for too long."""
    held = ""
    for piece in pieces:
        held += piece
        while len(held) >= 2 * PIECE_CHARS:
            place = find_cut(encoder, held, PIECE_CHARS) or find_cut(encoder, held, len(held) - CONTEXT_CHARS)
            if place is None:
                break
            yield from encoder.encode_batch([held[:place]])
            held = held[place:]
        if len(held) > MOST_UNCUT_CHARS:
            raise BadDocument("cannot be cut", f"a text of more than {MOST_UNCUT_CHARS} characters without a place "
                                               f"where the tokenizer's ids may be cut")
    yield from encoder.encode_batch([held])


def slices(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    return (text[start:start + size] for start in range(0, len(text), size))


def find_cut(encoder: Encoder, text: str, near: int) -> int | None:
    """Return the last place in the SEARCHED_CHARS before `near` where the text may be cut, None without one."""
    places = [match.start() for match in LIKELY.finditer(text, max(1, near - SEARCHED_CHARS), near)]
    return next((place for place in reversed(places[-MOST_TRIED:]) if _may_cut(encoder, text, place)), None)


def _may_cut(encoder: Encoder, text: str, place: int) -> bool:
    before, after = text[max(0, place - CONTEXT_CHARS):place], text[place:place + CONTEXT_CHARS]
    whole, left, right = encoder.encode_batch([before + after, before, after])
    return np.array_equal(whole, np.concatenate([left, right]))
