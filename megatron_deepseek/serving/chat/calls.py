"""Reads the tool calls in an answer as it comes, in the two forms of DeepSeek's releases.

  fenced  V3, R1  <calls begin> <call begin> function <sep> NAME\\n```json\\n ARGUMENTS \\n``` <call end> .. <calls end>
  bare    V3.1    <calls begin> <call begin> NAME <sep> ARGUMENTS <call end> .. <calls end>

A call is told once its name and the brace that opens its arguments are there; arguments follow as they come. What does
not begin like a call is text: all of it, with its control tokens as they are written.
"""

import re
from collections.abc import Iterator

from megatron_deepseek.finetuning.templates import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR
from megatron_deepseek.serving.chat.delta import CallDelta, ChatDelta
from megatron_deepseek.serving.chat.tools import NAME

FENCED, BARE = "fenced", "bare"
LONGEST_HEADER = 256  # characters in which a call's name must be found
_FENCED_NAME = re.compile(rf"\s*({NAME.pattern})[ \t]*\n```(?:json)?[ \t]*\n")
_CLOSING = re.compile(r"\s*(?:`{1,3}\s*)?$")  # the end of fenced arguments, as far as it has come


class CallReader:
    """Reads from the token <calls begin> on, until `done`. `index` is the number of the next call."""

    def __init__(self, form: str, index: int = 0):
        self.form, self.index = form, index
        self.done = False
        self._raw = CALLS  # what would be text if no call comes of it
        self._state = self._between
        self._header = ""
        self._held = ""  # arguments that may be the closing fence, or blanks before the first brace

    def feed(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Read a piece of text, or a control token by its text; yield what it tells."""
        yield from self._state(piece, control)

    def end(self) -> Iterator[ChatDelta]:
        """Yield what was held back: the answer has ended."""
        if self._state == self._arguments and not self._raw:
            yield from self._show("" if "`" in self._held else self._held)
        else:
            yield from self._as_text()
        self.done = True

    def _as_text(self) -> Iterator[ChatDelta]:
        if self._raw.strip():
            yield ChatDelta(content=self._raw)
        self._raw, self.done = "", True

    def _between(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Read what is before a call, or behind one."""
        self._raw += piece
        if control and piece == CALL:
            self._header, self._state = "", self._kind if self.form == FENCED else self._name
        elif control and piece == END_CALLS and not self._raw.startswith(CALLS):
            self._raw, self.done = "", True
        elif control or piece.strip():
            yield from self._as_text()

    def _kind(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Read the word function, behind <call begin> in the fenced form."""
        self._raw += piece
        if not control:
            self._header += piece
        if control and piece == SEPARATOR and self._header.strip() == "function":
            self._header, self._state = "", self._fenced_name
        elif control or len(self._header) > LONGEST_HEADER:
            yield from self._as_text()

    def _fenced_name(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        self._raw += piece
        self._header += "" if control else piece
        found = _FENCED_NAME.match(self._header)
        if found and not control:
            yield from self._begin(found[1], self._header[found.end():])
        elif control or len(self._header) > LONGEST_HEADER:
            yield from self._as_text()

    def _name(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Read the name, behind <call begin> in the bare form."""
        self._raw += piece
        self._header += "" if control else piece
        if control and piece == SEPARATOR and NAME.fullmatch(self._header.strip()):
            yield from self._begin(self._header.strip(), "")
        elif control or len(self._header) > LONGEST_HEADER:
            yield from self._as_text()

    def _begin(self, name: str, rest: str) -> Iterator[ChatDelta]:
        """Go on to the arguments, of which `rest` has come already."""
        self._header, self._held, self._state = name, "", self._arguments
        if rest:
            self._raw = self._raw.removesuffix(rest)
            yield from self._arguments(rest, False)

    def _arguments(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        if self._raw:
            yield from self._first_brace(piece, control)
        elif control and piece in (END_CALL, CALL, END_CALLS):
            yield from self._close(piece)
        else:
            yield from self._more(piece)

    def _first_brace(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Tell the call once its arguments begin as an object does."""
        self._raw += piece
        self._held += "" if control else piece
        begun = self._held.lstrip()
        if control or begun and not begun.startswith("{"):
            yield from self._as_text()
        elif begun:
            self._raw, self._held = "", ""
            yield ChatDelta(call=CallDelta.begin(self.index, self._header))
            yield from self._more(begun)

    def _more(self, piece: str) -> Iterator[ChatDelta]:
        self._held += piece
        closing = len(self._held) - len(_CLOSING.search(self._held)[0]) if self.form == FENCED else len(self._held)
        shown, self._held = self._held[:closing], self._held[closing:]
        yield from self._show(shown)

    def _show(self, arguments: str) -> Iterator[ChatDelta]:
        if arguments:
            yield ChatDelta(call=CallDelta(self.index, arguments))

    def _close(self, control: str) -> Iterator[ChatDelta]:
        """End a call, by its token or by the one that would come after it."""
        self._held, self._state = "", self._between
        self.index += 1
        if control != END_CALL:
            yield from self._between(control, True)
