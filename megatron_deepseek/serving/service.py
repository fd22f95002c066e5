"""What the routes ask of: the model, its engine's thread, and how much is let in."""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.serving.chat import ChatFormat
from megatron_deepseek.serving.engine_thread import EngineThread
from megatron_deepseek.serving.errors import ApiError, from_words
from megatron_deepseek.serving.limits import Limits
from megatron_deepseek.serving.metrics import Metrics
from megatron_deepseek.serving.sampling_fields import Defaults
from megatron_deepseek.serving.ticket import Ask, Ticket
from megatron_deepseek.serving.token_text import TokenText


@dataclass(frozen=True)
class ServedModel:
    """The model that is served: its names, the first of which answers bear, what holds for it, and since when."""

    names: tuple[str, ...]
    defaults: Defaults
    usual_length: int | None
    created: int

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, name: str | None) -> None:
        """Raise ApiError for another model's name; a request without one means this model."""
        if name is not None and name not in self.names:
            raise ApiError(404, f"The model `{name[:100]}` does not exist", "model")


class Service:
    """Asks the engine, within limits. `chat` is the form of chats, None where the tokenizer has none."""

    def __init__(self, replicas: Replicas, model: ServedModel, limits: Limits, chat: ChatFormat | None = None,
                 verbose: bool = False):
        self.model, self.limits, self.chat = model, limits, chat
        self.tokenizer: Tokenizer | None = replicas.engine.loaded.tokenizer
        self.tokens = TokenText(self.tokenizer) if self.tokenizer is not None else None
        self.check = replicas.engine.check
        self.engine = EngineThread(replicas, self._take, self._fail, verbose)
        self.failed = anyio.Event()
        self._tickets: dict[str, Ticket] = {}
        self._answering = 0
        self.metrics = Metrics(model.name, lambda: self.engine.statistics, lambda: self._answering)

    @property
    def healthy(self) -> bool:
        """Return whether answers can be expected: the thread may still be ending when all have been told."""
        return self.engine.alive and not self.failed.is_set()

    def checked(self, prompt: str | list[int], parameters: SamplingParameters, field: str) -> tuple[int, ...]:
        """Return a prompt's ids; raise ApiError that names the field unless the model can be asked with them."""
        try:
            return self.check(prompt, parameters)
        except ValueError as error:
            word = str(error).split()[0]
            raise from_words(str(error), word if word in ("logit_bias", "stop_token_ids", "stop") else field) from error

    @asynccontextmanager
    async def asked(self, ask: Ask) -> AsyncIterator[Ticket]:
        """Ask the engine, and stop what is not finished when the block ends. Raise ApiError where it is too much."""
        self.limits.admit(ask.num_answers, self._answering)
        if not self.healthy:
            raise ApiError(503, "The engine has stopped.")
        ticket = Ticket(uuid.uuid4().hex, ask)
        self._answering += ask.num_answers
        self._tickets.update(dict.fromkeys(ticket.names, ticket))
        try:
            for name, prompt, parameters in zip(ticket.names, ask.prompts, ask.parameters):
                self.engine.add(name, prompt, parameters)
            yield ticket
        finally:
            self._answering -= ask.num_answers
            if ticket.left:
                self.metrics.ended("abort", ticket.left)
            for name in ticket.names:
                del self._tickets[name]
                if ticket.left:
                    self.engine.abort(name)

    def _take(self, outputs: list[Output]) -> None:
        now = time.monotonic()
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None:  # else it was stopped while this step ran
                self.metrics.see(ticket.put(output), output, now)

    def end(self) -> None:
        """Tell all who wait that the server ends."""
        self._tell_all(ApiError(503, "The server is being stopped."))

    def _fail(self) -> None:
        self._tell_all(ApiError(500, "The engine has stopped."))
        self.failed.set()

    def _tell_all(self, error: ApiError) -> None:
        for ticket in set(self._tickets.values()):
            ticket.fail(error)
