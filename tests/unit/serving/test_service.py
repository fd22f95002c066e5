"""The service without HTTP: an engine that fails, answers that nobody reads yet."""

import asyncio
import json
from dataclasses import replace

import pytest

from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.serving.access import Access
from megatron_deepseek.serving.app import make_app
from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.limits import Limits
from megatron_deepseek.serving.sampling_fields import Defaults
from megatron_deepseek.serving.service import ServedModel, Service
from megatron_deepseek.serving.ticket import Ask, Ticket

TWICE = SamplingParameters(n=2, max_tokens=3)
MODEL = ServedModel(("tiny",), Defaults(SamplingParameters(), 64), None, 0)


def output(name: str, index: int, number: int, reason: str | None = None) -> Output:
    return Output(name, index, (1,), [7] * number, None, finish_reason=reason)


def test_answers_are_numbered_by_prompt_and_n_and_only_the_last_state_is_kept():
    async def scenario() -> tuple[list, list]:
        ticket = Ticket("a", Ask(((1,), (2,)), (TWICE, TWICE)))
        for number in (1, 2):
            ticket.put(output("a-1", 0, number))
        changes = ticket.changes()
        first = await anext(changes)
        for name in ("a-0", "a-1"):
            for index in (0, 1):
                ticket.put(output(name, index, 3, "length"))
        return first, [each async for each in changes]

    first, rest = asyncio.run(scenario())
    assert [(number, len(each.tokens)) for number, each in first] == [(2, 2)]
    assert [[number for number, _ in new] for new in rest] == [[0, 1, 2, 3]]


async def asked(app, path: str, body: dict) -> list[dict]:
    """What the application sends for one request, whose client stays until all is there."""
    content, sent = json.dumps(body).encode(), []
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": ""}
    given = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict:
        return given.pop() if given else await asyncio.Future()

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_an_answer_that_takes_too_long(engine):
    """It is 504, and a client is told not to try again; a stream says so in an event, and ends as streams do."""
    replicas = Replicas(engine.loaded, engine.settings, stream=True)
    model = replace(MODEL, defaults=Defaults(SamplingParameters(), 4096))
    service = Service(replicas, model, Limits(running=4, request_seconds=0.5))
    app = make_app(service, Access(), "0")
    endless = {"prompt": [1, 2, 3], "max_tokens": 4000, "ignore_eos": True}

    async def scenario() -> tuple[list, list]:
        service.engine.start()
        try:
            answers = await asyncio.gather(*(
                asked(app, "/v1/completions", endless | {"stream": stream}) for stream in (False, True)))
            while replicas.statistics.running:  # ends where what is too late is stopped
                await asyncio.sleep(0.01)
            return answers
        finally:
            await asyncio.to_thread(service.engine.close, 60)

    (begin, whole), (begun, *events) = asyncio.run(scenario())
    assert begin["status"] == 504 and (b"x-should-retry", b"false") in begin["headers"]
    assert json.loads(whole["body"])["error"]["type"] == "GatewayTimeoutError"
    assert begun["status"] == 200 and b'"choices"' in events[0]["body"]
    assert b'"code":504' in events[-2]["body"] and events[-1]["body"] == b"data: [DONE]\n\n"
    assert replicas.statistics.blocks_used == 0 and replicas.statistics.output_tokens < 8000


def test_an_engine_that_fails_is_told_to_all(engine, monkeypatch, capsys):
    """Also to who asks later; the words of the error, which may have paths and prompts in them, are not shown."""
    replicas = Replicas(engine.loaded, engine.settings, stream=True)
    service = Service(replicas, MODEL, Limits(running=4))

    def fail():
        raise RuntimeError("/a/path and a prompt")

    async def ask() -> None:
        async with service.asked(Ask(((1, 2),), (TWICE,))) as ticket:
            await ticket.finished()

    async def scenario() -> None:
        monkeypatch.setattr(replicas.engine, "step", fail)
        service.engine.start()
        assert service.healthy
        for status in (500, 503):
            with pytest.raises(ApiError) as told:
                await asyncio.wait_for(ask(), 120)
            assert told.value.status == status
            await asyncio.to_thread(service.engine.close, 10)
        assert not service.healthy and service.failed.is_set()

    asyncio.run(scenario())
    assert capsys.readouterr().err == "the engine has stopped: RuntimeError\n"


@pytest.mark.parametrize("number, answering, status", [
    (1, 5, 200), (1, 6, 429), (6, 0, 200), (6, 1, 429), (7, 0, 400)])
def test_what_is_let_in(number, answering, status):
    try:
        Limits(running=2, queue=4).admit(number, answering)
        found = 200
    except ApiError as error:
        found = error.status
        assert (status == 429) == ("Retry-After" in error.headers)
    assert found == status
