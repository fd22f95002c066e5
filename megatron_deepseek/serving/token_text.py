"""What single tokens say: their bytes, and the texts by which log-probabilities name them.

A token may hold a part of a character. Its bytes are those of the vocabulary, whatever its kind: byte-level BPE writes
each byte as a character of its own, SentencePiece a blank as a low line and lone bytes as <0xE4>.
"""

import re
from functools import lru_cache

from megatron_deepseek.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BLANK = "\u2581"


class TokenText:
    """Tokens as bytes and as texts. Calls for one token are cached: the same few are asked for again and again."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._kind = _decoder_kind(tokenizer)
        self._added = tokenizer.backend.get_added_tokens_decoder() if self._kind is not None else {}
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """Return a token's text; of one that is no text by itself the bytes, as OpenAI writes them: bytes:\\xe4."""
        found = self.bytes_of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _bytes_of(self, token: int) -> bytes:
        if isinstance(self.tokenizer, ByteTokenizer) and token < 256:
            return bytes([token])
        if self._kind is None or token in self._added:
            return self.tokenizer.decode([token]).encode()
        written = self.tokenizer.backend.id_to_token(token) or ""
        if self._kind == "bytes":
            return bytes(_BYTES_OF[each] for each in written if each in _BYTES_OF)
        byte = _BYTE.fullmatch(written)
        return bytes([int(byte[1], 16)]) if byte else written.replace(_BLANK, " ").encode()


def _decoder_kind(tokenizer: Tokenizer) -> str | None:
    """Return how a tokenizer.json writes bytes: "bytes" for byte-level BPE, "pieces" for SentencePiece, else None."""
    if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.backend.decoder is None:
        return None
    stated = tokenizer.backend.decoder.__getstate__().decode()
    if '"ByteLevel"' in stated:
        return "bytes"
    return "pieces" if '"Metaspace"' in stated or '"ByteFallback"' in stated else None


def _byte_level() -> dict[str, int]:
    """Return the byte of each character by which byte-level BPE writes bytes (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES_OF = _byte_level()
