"""Control tokens that somebody writes into a message are text: they neither end the message nor begin another's.

They are marked before a template sees the message, and what is marked is encoded without added tokens. The method, and
so the ids, are those of transformers' apply_chat_template(sanitize_control_tokens=True). Tags of thoughts stay tokens:
assistants' messages carry them.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_deepseek.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megatron_deepseek.finetuning.templates import END_THINK, THINK

_BEGIN, _END = "\ue0f0", "\ue0f1"  # private use: no script has them; those in a message are dropped


class WrittenTokens:
    """Marks and encodes for one tokenizer. One without a tokenizer.json reads no token in a text to begin with."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens = self._marked = None
        if isinstance(tokenizer, HuggingFaceTokenizer):
            added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
            longest_first = sorted(added - {THINK, END_THINK}, key=lambda token: (-len(token), token))
            one_of = "|".join(map(re.escape, longest_first)) or "(?!)"
            self._tokens = re.compile(one_of)
            self._marked = re.compile(f"{_BEGIN}({one_of}){_END}|[{_BEGIN}{_END}]")

    def mark(self, value: Any) -> Any:
        """Return a text, or all texts in a JSON value but the keys, with the tokens in them marked."""
        if isinstance(value, str) and self._tokens is not None:
            clean = value.replace(_BEGIN, "").replace(_END, "")
            return self._tokens.sub(rf"{_BEGIN}\g<0>{_END}", clean)
        if isinstance(value, Mapping):
            return {key: self.mark(each) for key, each in value.items()}
        return [self.mark(each) for each in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, in which tokens are tokens unless they are marked."""
        if self._marked is None:
            return self._tokenizer.encode(text)
        ids: list[int] = []
        for place, piece in enumerate(self._marked.split(text)):
            if piece:
                ids += self._plain(piece) if place % 2 else self._tokenizer.encode(piece)
        return ids

    def _plain(self, text: str) -> list[int]:
        """Return the ids of a text in which no added token is looked for."""
        backend = self._tokenizer.backend
        text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = [text] if backend.pre_tokenizer is None else [
            word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]
