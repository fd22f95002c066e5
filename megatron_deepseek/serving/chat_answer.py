"""From the engine's outputs to the choices of /v1/chat/completions, whole or in pieces."""

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from megatron_deepseek.inference.output import Output
from megatron_deepseek.serving.chat import AnswerParser
from megatron_deepseek.serving.chat_request import ChatRequest
from megatron_deepseek.serving.logprobs import chat_logprobs, prompt_logprobs
from megatron_deepseek.serving.service import Service
from megatron_deepseek.serving.ticket import Ticket
from megatron_deepseek.serving.usage import Usage


@dataclass
class ChatChoice:
    """One answer in pieces. What concerns single tokens goes with the next piece that is sent."""

    request: ChatRequest
    service: Service
    number: int
    parser: AnswerParser = field(init=False)
    tokens: int = 0
    begun: bool = False

    def __post_init__(self):
        self.parser = self.request.question.parser()

    def pieces(self, output: Output) -> Iterator[dict]:
        """Yield as choices what is new: the role first, then a piece for each delta, the reason of the end last."""
        if not self.begun:
            self.begun = True
            yield self._piece({"role": "assistant", "content": ""}) | (
                {"token_ids": []} if self.request.token_ids else {})
        deltas = [delta.fields() for delta in self.parser.update(output)]
        if output.finished:
            deltas.append({})
        for place, delta in enumerate(deltas):
            ends = output.finished and place == len(deltas) - 1
            yield self._piece(delta) | (self._of_end(output) if ends else {}) | self._of_tokens(output)

    def _piece(self, delta: dict) -> dict:
        return {"index": self.number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _of_end(self, output: Output) -> dict:
        return {"finish_reason": self.parser.finish_reason(output), "stop_reason": output.stop_reason}

    def _of_tokens(self, output: Output) -> dict:
        """Return the log-probabilities and ids of the tokens that are settled and were not sent."""
        new = slice(self.tokens, output.settled)
        self.tokens = max(self.tokens, output.settled)
        found = {}
        if self.request.logprobs is not None:
            content = logprobs_of(self.request, self.service, output, new)
            found["logprobs"] = {"content": content} if content else None
        if self.request.token_ids:
            found["token_ids"] = output.tokens[new]
        return found


def logprobs_of(request: ChatRequest, service: Service, output: Output, part: slice) -> list[dict]:
    """Return the log-probabilities of a part of an answer's tokens."""
    return chat_logprobs(service.tokens, output.tokens[part], output.log_probabilities[part],
                         output.top_log_probabilities[part], request.logprobs, request.tokens_as_ids)


def whole_choice(request: ChatRequest, service: Service, number: int, output: Output) -> dict:
    """Return a finished answer as a choice."""
    parser = request.question.parser()
    parser.update(output)
    logprobs = None
    if request.logprobs is not None:
        logprobs = {"content": logprobs_of(request, service, output, slice(None))}
    choice = {"index": number, "message": parser.message(), "logprobs": logprobs,
              "finish_reason": parser.finish_reason(output), "stop_reason": output.stop_reason}
    return choice | ({"token_ids": output.tokens} if request.token_ids else {})


async def chat_completion(request: ChatRequest, service: Service, ticket: Ticket, name: str) -> dict:
    """Return the whole answer to a request."""
    outputs = await ticket.finished()
    usage = Usage.of(request.ask)
    for number, output in enumerate(outputs):
        usage.count(number, len(output.tokens))
    choices = [whole_choice(request, service, number, output) for number, output in enumerate(outputs)]
    return _common(request, name, "chat.completion") | {"choices": choices, "usage": usage.shown} \
        | _of_prompt(request, service, outputs[0])


async def chat_chunks(request: ChatRequest, service: Service, ticket: Ticket, name: str) -> AsyncIterator[dict]:
    """Yield the chunks of a stream."""
    usage, common = Usage.of(request.ask), _common(request, name, "chat.completion.chunk")
    choices = [ChatChoice(request, service, number) for number in range(request.ask.num_answers)]
    begun = False
    async for new in ticket.changes():
        for number, output in new:
            usage.count(number, len(output.tokens))
            for piece in choices[number].pieces(output):
                of_prompt = {} if begun else _of_prompt(request, service, output)
                begun = True
                yield common | {"choices": [piece]} | usage.in_chunk(request.stream) | of_prompt
    if request.stream.include_usage:
        yield common | {"choices": [], "usage": usage.shown}


def _of_prompt(request: ChatRequest, service: Service, output: Output) -> dict:
    """Return what was asked for about the prompt: its ids and log-probabilities, as vLLM shows them."""
    found = {"prompt_token_ids": list(request.ask.prompts[0])} if request.token_ids else {}
    if request.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_logprobs(service.tokens, output.prompt_top_log_probabilities,
                                                   request.prompt_logprobs)
    return found


def _common(request: ChatRequest, name: str, kind: str) -> dict:
    return {"id": name, "object": kind, "created": int(time.time()), "model": request.model}
