"""One HTTP request's answers on their way from the engine's thread to the event loop.

The engine may be faster than the reader of a stream: only the last state of each answer is kept, which says all that
the states before it did. So a slow reader costs no memory, and gets fewer and larger pieces.
"""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import anyio

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.metrics import Progress


@dataclass(frozen=True)
class Ask:
    """What the engine is asked: prompts as ids, each with `parameters.n` answers."""

    prompts: tuple[tuple[int, ...], ...]
    parameters: Sequence[SamplingParameters]

    @property
    def num_answers(self) -> int:
        return sum(each.n for each in self.parameters)


class Ticket:
    """The answers to an `Ask`, numbered as OpenAI numbers choices: those to the first prompt, those to the second.

    `names` are the engine's of its requests. All but the making is called in the event loop.
    """

    def __init__(self, name: str, ask: Ask):
        self.ask = ask
        self.names = [f"{name}-{place}" for place in range(len(ask.prompts))]
        counts = [each.n for each in ask.parameters]
        self._first = {each: sum(counts[:place]) for place, each in enumerate(self.names)}
        self.left = ask.num_answers
        asked_at = time.monotonic()
        self._progress = [Progress(asked_at) for _ in range(ask.num_answers)]
        self._new: dict[int, Output] = {}
        self._changed = anyio.Event()
        self._failure: ApiError | None = None

    def put(self, output: Output) -> Progress:
        """Take a state of one answer; return what was known of it."""
        number = self._first[output.request_id] + output.index
        self._new[number] = output
        self.left -= output.finished
        self._changed.set()
        return self._progress[number]

    def fail(self, error: ApiError) -> None:
        """Let whoever waits for answers get this error."""
        self._failure = error
        self._changed.set()

    async def changes(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """Yield what is new, with the numbers of the answers, until all are finished. Raise ApiError if none can be."""
        while True:
            await self._changed.wait()
            if self._failure is not None:
                raise self._failure
            new, self._new, self._changed = self._new, {}, anyio.Event()
            if new:
                yield sorted(new.items(), key=lambda each: each[0])
            if not self.left and not self._new:
                return

    async def finished(self) -> list[Output]:
        """Return all answers, in their order, once all are finished."""
        answers: dict[int, Output] = {}
        async for new in self.changes():
            answers.update(new)
        return [answers[number] for number in range(self.ask.num_answers)]
