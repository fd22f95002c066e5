"""An answer as it comes, to reasoning, text and tool calls.

Control tokens are known by their ids, so the same letters in a text are text. The engine says how much of the answer's
text is settled: without characters in pieces, stop strings, and what may become one. So much is shown: a stop string
may begin in the middle of a control token's text, and then the token is no more than the letters before it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_deepseek.finetuning.templates import CALLS, END_THINK, THINK
from megatron_deepseek.inference.output import Output
from megatron_deepseek.serving.chat.calls import CallReader
from megatron_deepseek.serving.chat.delta import ChatDelta, joined, message_of

LINES, BARE = "lines", "bare"  # how reasoning is written: with line ends about its tags, which are layout, or without


@dataclass(frozen=True)
class AnswerForm:
    """How a model's answers are written. `control`: the ids of the tags and the tool tokens that its tokenizer has.

    `thoughts`: LINES or BARE. `calls`: the form of tool calls, FENCED or BARE, None where they are text.
    """

    control: dict[str, int]
    thoughts: str
    calls: str | None


class AnswerParser:
    """Reads one answer. `begins_inside` says whether the prompt has opened the reasoning. Where `shows_reasoning` is
    false reasoning is read, but not returned.
    """

    def __init__(self, form: AnswerForm, begins_inside: bool, most_calls: int | None = None,
                 shows_reasoning: bool = True):
        self._names = {identity: name for name, identity in form.control.items()}
        self._shows_reasoning = shows_reasoning
        self._num_tokens = self._num_characters = 0  # of the answer, that were read
        self._reader = _Reader(form, begins_inside, most_calls)
        self._deltas: list[ChatDelta] = []

    def update(self, output: Output) -> list[ChatDelta]:
        """Return what is new in an answer; all of the rest once it is finished. Outputs between may be left out."""
        found = [delta for piece, control in self._pieces(output) for delta in self._reader.feed(piece, control)]
        if output.finished:
            found += self._reader.end()
        found = joined(delta for delta in found if self._shows_reasoning or delta.reasoning is None)
        self._deltas += found
        return found

    def message(self) -> dict[str, Any]:
        """Return all so far as the message of a response."""
        return message_of(self._deltas)

    def finish_reason(self, output: Output) -> str | None:
        """Return why the answer ended, in OpenAI's words."""
        called = any(delta.call is not None for delta in self._deltas)
        return "tool_calls" if called and output.finish_reason == "stop" else output.finish_reason

    def _pieces(self, output: Output) -> Iterator[tuple[str, bool]]:
        """Yield the settled text that was not read, in pieces: control tokens, and what is between them.

        A control token of which not all is settled waits; where a stop string has cut it, it is text.
        """
        settled = len(output.text)
        for token, end in zip(output.tokens[self._num_tokens:], output.text_ends[self._num_tokens:]):
            name = self._names.get(token)
            if end > settled and (name is not None or self._num_characters == settled):
                break
            piece = output.text[self._num_characters:min(end, settled)]
            self._num_characters += len(piece)
            if name is not None and piece.endswith(name):
                yield piece.removesuffix(name), False  # a character in pieces may stand before it
                yield name, True
            else:
                yield piece, False
            if end > settled:
                break
            self._num_tokens += 1


class _Reader:
    """The state of an answer: at its beginning, in its reasoning, its text, or its calls."""

    def __init__(self, form: AnswerForm, begins_inside: bool, most_calls: int | None):
        self._form, self._most_calls = form, most_calls
        self._tags = {THINK, END_THINK} & form.control.keys()  # those that are tokens; others are text
        self._state = self._reasoning if begins_inside else self._beginning
        self._held = ""  # what may be layout, or the beginning of a tag
        self._leads = True  # nothing of this part was shown, so that line ends are layout
        self._calls: CallReader | None = None
        self._num_calls = 0

    def feed(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Read a piece of text, which may be empty, or a control token by its text; yield what it tells."""
        if not piece:
            return
        for delta in self._state(piece, control):
            if delta.call is None or self._most_calls is None or delta.call.index < self._most_calls:
                yield delta

    def end(self) -> Iterator[ChatDelta]:
        """Yield what was held back: reasoning that never ended keeps the beginning of a tag, but no line ends."""
        if self._calls is not None:
            yield from self._calls.end()
        elif self._state == self._reasoning:
            yield from _reasoning(self._held.rstrip("\n") if self._form.thoughts == LINES else self._held)
        elif self._state == self._beginning:
            yield from _content(self._held)

    def _beginning(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Read the first pieces, blanks at most: the answer may open its reasoning by itself."""
        if control and piece == THINK:
            self._held, self._state = "", self._reasoning
        elif control and piece == END_THINK:
            self._held, self._state = "", self._content
        elif control:
            yield from self._go_on("", piece, control)
        elif THINK in self._tags:
            self._held += piece
            if self._held.strip():
                yield from self._go_on(self._held, "", False)
        else:
            yield from self._written_tag(piece)

    def _written_tag(self, piece: str) -> Iterator[ChatDelta]:
        """Do the same for a tag that is no token."""
        self._held += piece
        begun = self._held.lstrip()
        if begun.startswith(THINK):
            self._held, self._state = "", self._reasoning
            yield from self._reasoning(begun[len(THINK):], False)
        elif not THINK.startswith(begun):
            yield from self._go_on(self._held, "", False)

    def _go_on(self, held: str, piece: str, control: bool) -> Iterator[ChatDelta]:
        """Read on as text, from the first character: the answer has no reasoning."""
        held, self._held, self._leads, self._state = held or self._held, "", False, self._content
        yield from _content(held)
        if piece:
            yield from self._content(piece, control)

    def _reasoning(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        if control and piece == END_THINK:
            yield from self._end_reasoning("")
        elif control and piece == THINK and self._leads:
            return  # a second one, behind the prompt's
        else:
            self._held += piece
            if END_THINK not in self._tags and END_THINK in self._held:
                thought, _, rest = self._held.partition(END_THINK)
                self._held = ""
                yield from self._show_reasoning(thought.rstrip("\n"))
                yield from self._end_reasoning(rest)
            else:
                yield from self._show_reasoning(self._take_settled())

    def _take_settled(self) -> str:
        """Return reasoning without what may be the line ends before its tag, or the beginning of a written tag."""
        text = self._held
        if END_THINK not in self._tags:
            text = text[:len(text) - _begun(text, END_THINK)]
        if self._form.thoughts == LINES:
            text = text.rstrip("\n")
        self._held = self._held[len(text):]
        return text

    def _show_reasoning(self, text: str) -> Iterator[ChatDelta]:
        if self._leads and self._form.thoughts == LINES:
            text = text.lstrip("\n")
        self._leads = self._leads and not text
        yield from _reasoning(text)

    def _end_reasoning(self, rest: str) -> Iterator[ChatDelta]:
        if self._form.thoughts == BARE:
            yield from _reasoning(self._held)
        self._held, self._leads, self._state = "", True, self._content
        if rest:
            yield from self._content(rest, False)

    def _content(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        if control and piece == CALLS and self._form.calls is not None:
            self._calls, self._state = CallReader(self._form.calls, self._num_calls), self._in_calls
            return
        if self._leads and self._form.thoughts == LINES:
            piece = piece.lstrip("\n")
        self._leads = self._leads and not piece
        yield from _content(piece)

    def _in_calls(self, piece: str, control: bool) -> Iterator[ChatDelta]:
        yield from self._calls.feed(piece, control)
        if self._calls.done:
            self._num_calls, self._calls, self._state = self._calls.index, None, self._content


def _reasoning(text: str) -> Iterable[ChatDelta]:
    return [ChatDelta(reasoning=text)] if text else []


def _content(text: str) -> Iterable[ChatDelta]:
    return [ChatDelta(content=text)] if text else []


def _begun(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `tag`."""
    return next((length for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), 0)
