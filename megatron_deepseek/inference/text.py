"""From text to a prompt's ids, and from an answer's tokens to its text, as they come."""

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.inference.stop_strings import StopSearch, StopStrings

BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet one
CONTEXT = 8  # tokens of the prompt that an answer's first token is decoded after


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text`, after the token that begins a document where the tokenizer asks for it.

    An empty text begins a document too: with that token, or else with the end of a document before it.
    """
    ids = tokenizer.encode(text)
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos]:
        return [tokenizer.bos, *ids]
    return ids or [tokenizer.eod]


class AnswerText:
    """The text of an answer, decoded token by token.

    A token is decoded after those before it, since tokenizers leave out the blank before the first word of a text. Only
    the last few tokens are decoded again, from a place on where no character was in pieces.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: tuple[int, ...], stop: StopStrings | None = None):
        self.tokenizer = tokenizer
        self.text, self.finished = "", False
        self.stop_string: str | None = None  # the one that ended the answer
        self.ends: list[int] = []  # the length of the text after each token
        self._window, self._cut = list(prompt[-CONTEXT:]), 0
        self._shown = _whole_length(tokenizer.decode(self._window))
        self._search = None if stop is None else StopSearch(stop)

    def add(self, token: int, may_stop: bool = True) -> bool:
        """Add a token's text; return whether a stop string is complete, which is then cut off with what follows.

        Unless it `may_stop`, stop strings that end in this token's text do not count.
        """
        self._window.append(token)
        decoded = self.tokenizer.decode(self._window)
        end = _whole_length(decoded)
        new, self._shown = decoded[self._shown:end], max(self._shown, end)
        if end == len(decoded):
            self._slide()
        stops = self._take(new, may_stop)
        self.ends.append(len(self.text))
        return stops

    def end(self) -> None:
        """Add what was held back as the beginning of a character that never came."""
        self.text += self.tokenizer.decode(self._window)[self._shown:]
        self.finished = True
        if self.ends:
            self.ends[-1] = len(self.text)

    @property
    def settled(self) -> str:
        """Return the text without what may become part of a stop string; all of it at the end."""
        held = 0 if self.finished or self._search is None else self._search.held
        return self.text[:len(self.text) - held]

    def _slide(self) -> None:
        """Keep the window short: let it begin where its text was whole, at least CONTEXT tokens ago."""
        if not self._cut:
            self._cut = len(self._window)
        elif len(self._window) - self._cut >= CONTEXT:
            self._window = self._window[self._cut:]
            self._cut, self._shown = len(self._window), len(self.tokenizer.decode(self._window))

    def _take(self, new: str, may_stop: bool) -> bool:
        found = None if self._search is None else self._search.feed(new, may_stop)
        if found is None:
            self.text += new
            return False
        end, length = found
        whole = self.text + new[:end]
        self.text, self.stop_string = whole[:-length], whole[-length:]
        self.ends = [min(each, len(self.text)) for each in self.ends]
        self.finished = True
        return True


def _whole_length(decoded: str) -> int:
    """Return the length of a text without a last character that may be in pieces."""
    return len(decoded) - decoded.endswith(BROKEN)
