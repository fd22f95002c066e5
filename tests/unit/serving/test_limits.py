"""Readers that leave or stand still, bodies without end, queues that are full, and the end of the server."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from served import Served, serving

ENDLESS = {"prompt": "what is it?", "max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def request(path: str, body: dict | bytes, *headers: str, length: int | None = None) -> bytes:
    """A request as bytes; `length` is what it says of its body's."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers,
            f"Content-Length: {len(content) if length is None else length}"]
    return "\r\n".join([*head, "", ""]).encode() + content


@contextmanager
def connected(served: Served, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(240)
        client.connect(("127.0.0.1", served.port))
        yield client


def until(client: socket.socket, words: bytes) -> bytes:
    """What comes, at least until these words are in it."""
    found = b""
    while words not in found:
        more = client.recv(65536)
        assert more, found
        found += more
    return found


def until_closed(client: socket.socket) -> bytes:
    """What comes until the server closes, which may be by a reset."""
    found = b""
    try:
        while more := client.recv(65536):
            found += more
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_closed_connection_stops_its_request_and_frees_its_blocks(served, path, stream):
    """With two answers each; the metrics say that they were stopped, long before they would have ended."""
    body = ENDLESS | {"n": 2, "stream": stream, "messages": [{"role": "user", "content": "what?"}]}
    aborted = served.metric("vllm:request_success_total", finished_reason="abort")
    made = served.metric("vllm:generation_tokens_total")
    with connected(served) as client:
        client.sendall(request(path, body))
        if stream:
            until(client, b"data: ")
        while not served.metric("vllm:num_requests_running"):
            time.sleep(0.01)
        assert served.metric("vllm:kv_cache_usage_perc") > 0
    served.wait_until_idle()
    assert served.metric("vllm:request_success_total", finished_reason="abort") == aborted + 2
    assert served.metric("vllm:generation_tokens_total") - made < 8000


def test_a_reader_that_stands_still_is_cut_off(served):
    """What it does not read fills the buffers; after --idle-seconds its connection is closed, its request stopped."""
    made = served.metric("vllm:generation_tokens_total")
    with connected(served, receive_buffer=4096) as client:
        client.sendall(request("/v1/completions", ENDLESS | {"stream": True, "logprobs": 20, "n": 4}))
        while not served.metric("vllm:num_requests_running"):
            time.sleep(0.01)
        served.wait_until_idle()
        assert b"[DONE]" not in until_closed(client)
    assert served.metric("vllm:generation_tokens_total") - made < 16000


def test_headers_that_never_end(served):
    """None at all, some, and those of a second request: the connection is closed after --idle-seconds."""
    begun = [b"", b"GET / HTTP/1.1\r\nHost: loc", request("/health", b"") + b"GET /"]
    begin = time.monotonic()
    with connected(served) as first, connected(served) as second, connected(served) as third:
        for client, content in zip((first, second, third), begun):
            client.sendall(content)
        for client in (first, second, third):
            until_closed(client)
    assert time.monotonic() - begin > 1.9


@pytest.fixture(scope="module")
def strict(checkpoint, tmp_path_factory) -> Iterator[Served]:
    """A server that takes two answers at most, of which one waits, and small bodies."""
    with serving(tmp_path_factory.mktemp("strict"), checkpoint, "--max-running", "1", "--max-queue", "1", "--max-body",
                 "64KiB", "--body-seconds", "1") as one:
        yield one


def test_a_queue_that_is_full(strict):
    with connected(strict) as first, connected(strict) as second:
        for client in (first, second):
            client.sendall(request("/v1/completions", ENDLESS))
        while strict.metric("vllm:num_requests_running") + strict.metric("vllm:num_requests_waiting") < 2:
            time.sleep(0.01)
        refused = strict.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.error["type"] == "RateLimitError"
    too_many = strict.post("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 1})
    assert too_many.status == 400  # which would never have a place
    strict.wait_until_idle()
    assert strict.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1}).status == 200


@pytest.mark.parametrize("more", [(), ("Expect: 100-continue",), ("Transfer-Encoding: chunked",)])
def test_a_body_that_is_too_long(strict, more):
    content = json.dumps({"prompt": "a" * 100_000}).encode()
    sent = request("/v1/completions", content, *more)
    if "Transfer-Encoding: chunked" in more:
        head = sent[:-len(content)].replace(f"Content-Length: {len(content)}\r\n".encode(), b"")
        sent = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    with connected(strict) as client:
        client.sendall(sent[:-len(content)] if more == ("Expect: 100-continue",) else sent)
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 413") and b"65,536 bytes" in answer


def test_a_body_that_never_ends(strict):
    with connected(strict) as client:
        client.sendall(request("/v1/completions", b'{"prompt": "a', length=100))
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive" in answer


def test_the_end_of_the_server_waits_for_answers(checkpoint, tmp_path):
    """SIGTERM: what was asked is answered to its end, nobody else is let in, and the status is 0."""
    with serving(tmp_path, checkpoint) as one, connected(one) as client:
        client.sendall(request("/v1/completions", ENDLESS | {"max_tokens": 250, "stream": True}, "Connection: close"))
        begun = until(client, b"data: ")
        os.kill(one.processes[0].pid, signal.SIGTERM)
        refused = _refused(one)
        answer = begun + until_closed(client)
        one.processes[0].join(240)
        assert refused and b"data: [DONE]" in answer and b'"length"' in answer
        assert one.processes[0].exitcode == 0 and one.errors.read_text() == ""


def test_the_end_of_the_server_does_not_wait_for_ever(checkpoint, tmp_path):
    """What is not answered by then is told so."""
    with serving(tmp_path, checkpoint, "--drain-seconds", "0.3") as one, connected(one) as client:
        client.sendall(request("/v1/completions", ENDLESS | {"stream": True}))
        until(client, b"data: ")
        os.kill(one.processes[0].pid, signal.SIGINT)
        one.processes[0].join(240)
        answer = until_closed(client)
        assert one.processes[0].exitcode == 0 and b'"code":503' in answer and b"data: [DONE]" in answer


def _refused(served: Served) -> bool:
    """Whether, within a time, the server takes no more connections."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            with connected(served):
                time.sleep(0.02)
        except ConnectionRefusedError:
            return True
    return False
