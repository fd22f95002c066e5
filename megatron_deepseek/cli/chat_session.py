"""A chat with a model, whatever it is typed into: messages, commands, and answers written as they come."""

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.serving.chat import AnswerParser, ChatDelta, ChatFormat

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = """/system TEXT   what the model is told before the chat; without TEXT nothing
/reset         forget the chat, but not the system's text
/undo          forget the last question and its answer
/save FILE     write the chat as a line of JSON, as fine-tuning reads it
/help          this
/exit          leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Shown:
    """An answer on its way to the screen. Reasoning is dimmed if the screen can."""

    write: Callable[[str], None]
    dims: bool
    reasoned: bool = False
    answered: bool = False

    def update(self, deltas: Iterable[ChatDelta]) -> None:
        """Write what is new."""
        for delta in deltas:
            if delta.reasoning is not None:
                self.reasoned = True
                self.write(f"{DIM}{delta.reasoning}{PLAIN}" if self.dims else delta.reasoning)
            elif delta.content is not None:
                self.write("\n\n" * (self.reasoned and not self.answered) + delta.content)
                self.answered = True


@dataclass
class ChatSession:
    """The messages so far, and the model that answers them. `write` prints without a line's end."""

    replicas: Replicas
    format: ChatFormat
    parameters: SamplingParameters
    write: Callable[[str], None]
    dims: bool = False
    system: str = ""
    messages: list[dict] = field(default_factory=list)

    def enter(self, line: str) -> bool:
        """Do what a line says: a command, or a question. Return whether the chat goes on."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        commands = {"/system": self._system, "/reset": self._reset, "/undo": self._undo, "/save": self._save,
                    "/help": lambda _: self._say(HELP)}
        if word in ("/exit", "/quit"):
            return False
        if word in commands:
            commands[word](rest.strip())
        elif word.startswith("/") and "/" not in word[1:]:
            self._say(f"{word} is no command; /help lists them")
        else:
            self.ask(line.strip())
        return True

    def ask(self, text: str) -> None:
        """Answer a question, and keep both. What cannot be asked is told in a line, and forgotten."""
        asked = [*self._before(), *self.messages, {"role": "user", "content": text}]
        try:
            question = self.format.question({"messages": asked})
            name = self.replicas.add(question.prompt, self.parameters)
        except ValueError as error:
            self._say(f"{error}; /undo or /reset makes room" if "max_length" in str(error) else str(error))
            return
        parser = question.parser()
        output, stopped = self._answer(name, parser)
        self.write("\n")
        if stopped or output is None or output.finish_reason == "length":
            self._say("[stopped]" if stopped else "[the answer is cut: --max-new-tokens or --seq-length]")
        if output is not None and output.text:
            answer = parser.message()
            self.messages += [{"role": "user", "content": text},
                              {**answer, "content": answer["content"] or ""}]

    def _answer(self, name: str, parser: AnswerParser) -> tuple[Output | None, bool]:
        """Write an answer as it comes; return it, and whether it was stopped by Ctrl-C."""
        shown, last = Shown(self.write, self.dims), None
        with _interruptions() as interrupted:
            while self.replicas.has_work:
                for output in self.replicas.step():
                    last = output
                    shown.update(parser.update(output))
                if interrupted() and self.replicas.has_work:
                    self.replicas.abort(name)
                    self.replicas.step()  # by which it comes to the other ranks
                    return last, True
        return last, False

    def _before(self) -> list[dict]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _system(self, text: str) -> None:
        self.system = text
        self._say("the model is told nothing before the chat" if not text else "set; /reset begins anew with it")

    def _reset(self, _: str) -> None:
        self.messages.clear()
        self._say("forgotten")

    def _undo(self, _: str) -> None:
        if not self.messages:
            self._say("there is nothing to forget")
            return
        del self.messages[-2:]
        self._say("forgotten; the last question is now: " + self.messages[-2]["content"] if self.messages else
                  "forgotten; the chat is empty")

    def _save(self, name: str) -> None:
        if not name:
            self._say("/save needs the name of a file")
            return
        chat = json.dumps({"messages": [*self._before(), *self.messages]}, ensure_ascii=False)
        try:
            Path(name).expanduser().write_text(chat + "\n", encoding="utf-8")
            self._say(f"saved to {name}")
        except OSError as error:
            self._say(f"{name} cannot be written: {error.strerror}")

    def _say(self, text: str) -> None:
        """Write a line that is not the model's."""
        self.write((f"{DIM}{text}{PLAIN}" if self.dims else text) + "\n")


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed in the `with` block; a second one interrupts at once.

    Between steps the engine is in order, inside of one it is not.
    """
    pressed: list[int] = []

    def note(number: int, frame) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
