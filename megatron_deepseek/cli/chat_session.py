"""A chat with a model, whatever it is typed into: messages, commands, and answers written as they come."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_deepseek.finetuning.chat import ChatFormat
from megatron_deepseek.finetuning.templates import END_THINK, THINK
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = """/system TEXT   what the model is told before the chat; without TEXT nothing
/reset         forget the chat, but not the system's text
/undo          forget the last question and its answer
/save FILE     write the chat as a line of JSON, as fine-tuning reads it
/help          this
/exit          leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Shown:
    """An answer on its way to the screen: how much of its reasoning and of its text was written.

    `split` gives both parts of an output. Reasoning is dimmed if the screen can.
    """

    write: Callable[[str], None]
    dims: bool
    split: Callable[[Output], tuple[str, str]]
    reasoning: int = 0
    text: int = 0

    def update(self, output: Output) -> None:
        """Write what is new."""
        reasoning, text = self.split(output)
        if len(reasoning) > self.reasoning:
            new = reasoning[self.reasoning:]
            self.write(f"{DIM}{new}{PLAIN}" if self.dims else new)
        if text and not self.text and reasoning:
            self.write("\n\n")
        self.write(text[self.text:])
        self.reasoning, self.text = len(reasoning), len(text)


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

    def ask(self, question: str) -> None:
        """Answer a question, and keep both. What cannot be asked is told in a line, and forgotten."""
        asked = [*self._before(), *self.messages, {"role": "user", "content": question}]
        try:
            name = self.replicas.add(self.format.prompt(asked), self.parameters)
        except ValueError as error:
            self._say(f"{error}; /undo or /reset makes room" if "max_length" in str(error) else str(error))
            return
        output, stopped = self._answer(name)
        self.write("\n")
        if stopped or output is None or output.finish_reason == "length":
            self._say("[stopped]" if stopped else "[the answer is cut: --max-new-tokens or --seq-length]")
        if output is not None and output.text:
            self.messages += [{"role": "user", "content": question}, self.format.message(output.text)]

    def _answer(self, name: str) -> tuple[Output | None, bool]:
        """Write an answer as it comes; return it, and whether it was stopped by Ctrl-C."""
        shown, last = Shown(self.write, self.dims, self._split), None
        with _interruptions() as interrupted:
            while self.replicas.has_work:
                for output in self.replicas.step():
                    last = output
                    shown.update(output)
                if interrupted() and self.replicas.has_work:
                    self.replicas.abort(name)
                    self.replicas.step()  # by which it comes to the other ranks
                    return last, True
        return last, False

    def _split(self, output: Output) -> tuple[str, str]:
        """Return reasoning and text of an answer so far, without the tags and the line ends about them.

        Reasoning ends at the token </think>, where there is such a token: as a text it may be written in between.
        """
        text, end = output.text, self.format.end_of_thought
        opened = text.lstrip().startswith(THINK)
        if opened:
            text = text.lstrip()[len(THINK):]
        elif THINK.startswith(text.strip()) and text.strip():
            return "", ""  # what may become <think>
        if not (opened or self.format.begins_with_thought):
            return "", text
        before, ended = 0, END_THINK in text
        if end is not None:
            ended = end in output.tokens
            thoughts = output.tokens[:output.tokens.index(end)] if ended else output.tokens
            before = self.format.encoder.tokenizer.decode(list(thoughts)).count(END_THINK)
        if not ended:
            return without_beginning(text, END_THINK).strip("\n") if not output.finished else text.strip("\n"), ""
        parts = text.split(END_THINK)
        reasoning, answer = END_THINK.join(parts[:before + 1]), END_THINK.join(parts[before + 1:])
        return reasoning.strip("\n"), answer.lstrip("\n")

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


def without_beginning(text: str, tag: str) -> str:
    """Return `text` without what may become `tag` at its end."""
    begun = next((length for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), 0)
    return text[:len(text) - begun]


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
