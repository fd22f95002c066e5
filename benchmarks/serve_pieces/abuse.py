"""Clients that misbehave, beside some that do not: for the latter nothing may change but the time that they wait.

Every kind is a coroutine that does one such thing and returns what the server said of it, in a word; those that are no
error of the server's are in EXPECTED. It needs the standard library alone, and speaks HTTP over plain sockets: what
is tried here is what no library does.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from prompts import body, requests

CLOSED = "closed"  # the server has ended the connection without a word
EXPECTED = {"good": {"200"}, "abort": {"left"}, "half_request": {"left", "408", CLOSED}, "bad_json": {"400"},
            "bad_field": {"400"}, "too_long": {"400"}, "too_large": {"413", CLOSED}, "no_such": {"404", "405"},
            "not_http": {"400", "200", CLOSED}, "slow_reader": {"200", CLOSED, "left"}, "flood": {"200", "429"}}


@dataclass
class Target:
    """A server on this machine, and a model of it."""

    port: int
    model: str
    longest: int = 1 << 30  # tokens of a prompt, and of an answer
    abandoned: int = 96  # tokens of an answer that nobody reads to its end
    generator: random.Random = field(default_factory=lambda: random.Random(1))

    def request(self, tokens: int | None = None) -> bytes:
        (prompt, usual), = requests(1, self.generator.randrange(1 << 30), self.longest)
        return json.dumps(body(self.model, prompt, tokens or usual)).encode()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 16)

    def post(self, content: bytes, path: str = "/v1/completions", length: int | None = None) -> bytes:
        return (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(content) if length is None else length}\r\n\r\n"
                ).encode() + content


async def answer_of(target: Target, sent: bytes) -> tuple[str, bytes]:
    """Send bytes; return the status, and all that came after the header."""
    reader, writer = await target.open()
    try:
        writer.write(sent)
        await writer.drain()
        whole = await reader.read(-1)
    except (ConnectionError, asyncio.IncompleteReadError):
        return CLOSED, b""
    finally:
        writer.close()
    if not whole:
        return CLOSED, b""
    head, _, rest = whole.partition(b"\r\n\r\n")
    return head.split(b" ", 2)[1].decode(), rest


async def good(target: Target) -> str:
    """Return 200 for a stream that is whole: it has its usage and its end, and no error. 429 is asked again."""
    request = target.post(target.request())
    while (found := await answer_of(target, request))[0] == "429":
        await asyncio.sleep(1)
    status, content = found
    if status != "200":
        return status
    whole = b"data: [DONE]" in content and b'"completion_tokens"' in content and b'"error"' not in content
    return "200" if whole else f"a broken stream: {content[-200:]!r}"


async def flood(target: Target) -> str:
    """Ask for 150 answers at once and return the worst status."""
    found = await asyncio.gather(*(answer_of(target, target.post(target.request(2))) for _ in range(150)))
    return max(status for status, _ in found)


async def abort(target: Target) -> str:
    """Leave in the middle of an answer, at any time from before its first token."""
    reader, writer = await target.open()
    writer.write(target.post(target.request(target.abandoned)))
    await writer.drain()
    if target.generator.random() < 0.7:
        await reader.read(target.generator.randrange(1, 3000))
    writer.transport.abort() if target.generator.random() < 0.5 else writer.close()
    return "left"


async def half_request(target: Target) -> str:
    """Promise more than is sent."""
    reader, writer = await target.open()
    writer.write(target.post(b'{"model": ', length=1000))
    await writer.drain()
    await asyncio.sleep(target.generator.random())
    writer.close()
    return "left"


async def bad_json(target: Target) -> str:
    content = target.generator.choice([b"{", b"", b"null", b"[1, 2]", b'{"prompt": "\xff\xfe"}', b"{'a': 1}", b"NaN",
                                       b"[" * 5000, b'{"a":' * 3000, b"\x00" * 100])
    return (await answer_of(target, target.post(content)))[0]


async def bad_field(target: Target) -> str:
    wrong = target.generator.choice([
        {"temperature": -1}, {"max_tokens": "many"}, {"prompt": {}}, {"prompt": [[1, -5]]}, {"prompt": [10**12]},
        {"n": 0}, {"stop": [1]}, {"logprobs": -3}, {"top_p": 7}, {"max_tokens": 10**15}, {"seed": "a"}])
    content = json.loads(target.request()) | wrong
    return (await answer_of(target, target.post(json.dumps(content).encode())))[0]


async def too_long(target: Target) -> str:
    content = body(target.model, [20] * 100_000, 5)
    return (await answer_of(target, target.post(json.dumps(content).encode())))[0]


async def too_large(target: Target) -> str:
    return (await answer_of(target, target.post(b'{"prompt": "' + b"x" * (9 << 20) + b'"}')))[0]


async def no_such(target: Target) -> str:
    path = target.generator.choice(["/v1/nothing", "/page/../../../etc/passwd", "/%2e%2e/x", "/metrics"])
    return (await answer_of(target, target.post(b"{}", path)))[0]


async def not_http(target: Target) -> str:
    noise = target.generator.choice([b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                                     b"A" * 70000 + b"\r\n\r\n"])
    return (await answer_of(target, noise))[0]


async def slow_reader(target: Target) -> str:
    """Ask for an answer and read a byte now and then, for some seconds."""
    reader, writer = await target.open()
    writer.write(target.post(target.request(96)))
    await writer.drain()
    for _ in range(20):
        if not await reader.read(1):
            return CLOSED
        await asyncio.sleep(0.2)
    writer.close()
    return "left"


KINDS: dict[str, Callable[[Target], Coroutine[None, None, str]]] = {
    each.__name__: each for each in (good, abort, half_request, bad_json, bad_field, too_long, too_large, no_such,
                                     not_http, slow_reader, flood)}
CLIENTS = {"good": 4, "abort": 6, "slow_reader": 6}  # of each kind; 1 of all others


async def misbehave(target: Target, seconds: float) -> tuple[dict[str, Counter], Counter]:
    """Return what each kind was told how often, and of that what was not to be expected."""
    told = {kind: Counter() for kind in KINDS}
    end = asyncio.get_running_loop().time() + seconds

    async def client(kind: str) -> None:
        while asyncio.get_running_loop().time() < end:
            try:
                told[kind][await asyncio.wait_for(KINDS[kind](target), 600)] += 1
            except (ConnectionError, OSError) as error:
                told[kind][CLOSED if isinstance(error, ConnectionResetError) else type(error).__name__] += 1
            except asyncio.TimeoutError:
                told[kind]["no answer in 600 s"] += 1
            await asyncio.sleep(0 if kind == "good" else 0.05)

    await asyncio.gather(*(client(kind) for kind in KINDS for _ in range(CLIENTS.get(kind, 1))))
    unasked = Counter({f"{kind}: {answer}": number for kind, answers in told.items()
                       for answer, number in answers.items() if answer not in EXPECTED[kind]})
    return told, unasked
