"""What clients are told: OpenAI's form, the right status, and the field that is wrong."""

import json
import socket

import pytest
from served import REPOSITORY, Answer, Served

CHAT = {"messages": [{"role": "user", "content": "what is it?"}], "max_tokens": 4}
TEXT = {"prompt": "what is it?", "max_tokens": 4}


def check(answer: Answer, status: int, param: str | None = None) -> dict:
    """The error, whose form is that of all errors."""
    assert answer.status == status, answer.content
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json) == {"error"} and set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["code"] == status and answer.error["param"] == param
    assert "Traceback" not in answer.error["message"] and str(REPOSITORY) not in answer.error["message"]
    return answer.error


@pytest.mark.parametrize("fields, param, words", [
    ({"prompt": None}, "prompt", "is missing"),
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": 5}, "prompt", "neither a text nor a list"),
    ({"prompt": ["a", 5]}, "prompt[1]", "neither a text nor a list of token ids"),
    ({"prompt": [[1], [True]]}, "prompt[1]", "neither a text nor a list of token ids"),
    ({"prompt": [999]}, "prompt", "token id 999"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": [1] * 4096}, "prompt", "room for one more"),
    ({"max_tokens": 4096}, "max_tokens", "more than the model's length"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"max_tokens": 2.5}, "max_tokens", "an integer"),
    ({"max_token": 4}, "max_token", "did you mean max_tokens?"),
    ({"max_new_tokens": 4}, "max_new_tokens", "did you mean max_tokens?"),
    ({"temperature": -1}, "temperature", "at least 0"),
    ({"temperature": "hot"}, "temperature", "no"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -2}, "top_k", "at least 0"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 10**9}, "n", "at most"),
    ({"best_of": 3}, "best_of", "n is 1"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"prompt_logprobs": 10**9}, "prompt_logprobs", "at most 20"),
    ({"stop": 5}, "stop", "no list"),
    ({"stop": {"a": 1}}, "stop", "no list"),
    ({"stop": ["a", 5]}, "stop", "no string"),
    ({"stop": ["x"] * 33}, "stop", "more than 32"),
    ({"stop": "x" * 5000}, "stop", "more than 4096"),
    ({"stop_token_ids": "abc"}, "stop_token_ids", "no list"),
    ({"stop_token_ids": [999]}, "stop_token_ids", "token id 999"),
    ({"logit_bias": [1]}, "logit_bias", "no object"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"999": 1}}, "logit_bias", "token id 999"),
    ({"ignore_eos": "yes"}, "ignore_eos", "true or false"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"min_tokens": 9}, "min_tokens", "greater than max_tokens"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"use_beam_search": True}, "use_beam_search", "not supported")])
def test_a_wrong_field_is_named(served, fields, param, words):
    error = check(served.post("/v1/completions", TEXT | fields), 400, param)
    assert words in error["message"] and error["type"] == "BadRequestError"


@pytest.mark.parametrize("fields, param", [
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": 3}, "logprobs"), ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"), ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"temperature": 1e400}, None), ({"n": 1000}, "n")])
def test_a_wrong_field_of_a_chat_is_named(served, fields, param):
    check(served.post("/v1/chat/completions", CHAT | fields), 400, param)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b"null", b'{"prompt": "a", "prompt": "b"}', b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000,
    b'{"prompt": "\\ud800"}', b'{"temperature": 1e999, "prompt": "a"}'])
def test_a_body_that_is_no_json_object(served, content):
    check(served.post("/v1/completions", content, Content_Type="application/json"), 400)


def test_other_paths_methods_models_and_types(served):
    assert "nope" in check(served.post("/v1/completions", TEXT | {"model": "nope"}), 404, "model")["message"]
    check(served.post("/v1/chat/completions", CHAT | {"model": "nope"}), 404, "model")
    check(served.ask("GET", "/v1/models/nope"), 404, "model")
    check(served.ask("GET", "/v1/embeddings"), 404)
    check(served.ask("GET", "/page/../app.py"), 404)
    answer = served.ask("GET", "/v1/completions")
    check(answer, 405)
    assert answer.headers["allow"] == "POST"
    check(served.post("/v1/completions", json.dumps(TEXT).encode(), Content_Type="text/plain"), 415)
    check(served.post("/v1/completions", json.dumps(TEXT).encode()), 415)


def test_what_is_no_http_is_told_so(served):
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == 400


def test_nothing_of_it_is_printed(served: Served):
    """No path, no prompt, no traceback, whatever was asked so far."""
    served.post("/v1/completions", TEXT | {"prompt": "a secret", "temperature": -1})
    assert served.errors.read_text() == ""
    assert len(served.out.read_text().splitlines()) == 2  # where it is, and how it chats
