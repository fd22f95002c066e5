"""From the engine's outputs to the choices of /v1/completions, whole or in pieces."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.text import AnswerText
from megatron_deepseek.serving.completion_request import CompletionRequest
from megatron_deepseek.serving.logprobs import completion_logprobs, prompt_logprobs
from megatron_deepseek.serving.service import Service
from megatron_deepseek.serving.ticket import Ticket
from megatron_deepseek.serving.usage import Usage


@dataclass
class Choice:
    """One answer, and how much of it was shown: `tokens` of them, `text` characters; the prompt counts as a piece."""

    request: CompletionRequest
    service: Service
    number: int
    begun: bool = False
    tokens: int = 0
    text: int = 0
    _echoed: tuple[str, list[int]] | None = field(default=None, repr=False)

    def piece(self, output: Output) -> dict | None:
        """Return as a choice what is new in `output`; None if nothing is."""
        request, first = self.request, not self.begun
        settled = 0 if request.nothing_new else output.settled
        said = "" if request.nothing_new else output.text
        new = range(self.tokens, settled)
        shows_tokens = request.token_ids or request.logprobs is not None
        if not (output.finished or len(said) > self.text or (new and shows_tokens)):
            return None
        echoed = self._echo(output) if first and request.echo else ""
        choice = {"index": self.number, "text": echoed + said[self.text:],
                  "logprobs": self._logprobs(output, new, first), "finish_reason": self._reason(output),
                  "stop_reason": None if request.nothing_new else output.stop_reason}
        if request.token_ids:
            choice["token_ids"] = output.tokens[new.start:new.stop]
            choice["prompt_token_ids"] = list(output.prompt) if first else None
        if request.prompt_logprobs and first:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.service.tokens, output.prompt_top_log_probabilities, self._parameters.prompt_logprobs)
        self.begun, self.tokens, self.text = True, settled, len(said)
        return choice

    @property
    def _parameters(self):
        return self.request.ask.parameters[0]

    def _reason(self, output: Output) -> str | None:
        return "length" if output.finished and self.request.nothing_new else output.finish_reason

    def _echo(self, output: Output) -> str:
        """Return the prompt's text, and remember where in it each of its tokens ends."""
        written = self.request.texts[self.number // self._parameters.n]
        if self.request.logprobs is None:
            return self.service.tokenizer.decode(list(output.prompt)) if written is None else written
        text, ends = prompt_text(self.service, output.prompt, written)
        self._echoed = text, ends
        return text

    def _logprobs(self, output: Output, new: range, first: bool) -> dict | None:
        """Return the log-probabilities of the new tokens, and before the first of them those of an echoed prompt."""
        number, request = self.request.logprobs, self.request
        if number is None:
            return None
        ids = output.tokens[new.start:new.stop]
        values: list = output.log_probabilities[new.start:new.stop]
        tops: list = output.top_log_probabilities[new.start:new.stop]
        text, ends = self._echoed or ("", [])
        offsets = [len(text) + (output.text_ends[place - 1] if place else 0) for place in new]
        if first and request.echo:
            ids, offsets = [*output.prompt, *ids], [0, *ends[:-1], *offsets]
            values = [*output.prompt_log_probabilities, *values]
            tops = [*output.prompt_top_log_probabilities, *tops]
        return completion_logprobs(self.service.tokens, ids, values, tops, offsets, number, request.tokens_as_ids)


def prompt_text(service: Service, prompt: tuple[int, ...], written: str | None) -> tuple[str, list[int]]:
    """Return the text of a prompt and its length after each token.

    A token that the tokenizer puts before a text that was written is not in that text.
    """
    text = AnswerText(service.tokenizer, ())
    for token in prompt:
        text.add(token)
    text.end()
    if written is None:
        return text.text, text.ends
    added = max(len(text.text) - len(written), 0)
    return written, [min(max(end - added, 0), len(written)) for end in text.ends]


async def completion(request: CompletionRequest, service: Service, ticket: Ticket, name: str) -> dict:
    """Return the whole answer to a request."""
    outputs = await ticket.finished()
    usage = Usage.of(request.ask)
    choices = []
    for number, output in enumerate(outputs):
        usage.count(number, 0 if request.nothing_new else len(output.tokens))
        choices.append(Choice(request, service, number).piece(output))
    return _whole(request, name) | {"choices": choices, "usage": usage.shown}


async def completion_chunks(request: CompletionRequest, service: Service, ticket: Ticket, name: str
                            ) -> AsyncIterator[dict]:
    """Yield the chunks of a stream."""
    usage, common = Usage.of(request.ask), _whole(request, name)
    choices = [Choice(request, service, number) for number in range(request.ask.num_answers)]
    async for new in ticket.changes():
        for number, output in new:
            usage.count(number, 0 if request.nothing_new else len(output.tokens))
            piece = choices[number].piece(output)
            if piece is not None:
                yield common | {"choices": [piece]} | usage.in_chunk(request.stream)
    if request.stream.include_usage:
        yield common | {"choices": [], "usage": usage.shown}


def _whole(request: CompletionRequest, name: str) -> dict:
    return {"id": name, "object": "text_completion", "created": int(time.time()), "model": request.model}
