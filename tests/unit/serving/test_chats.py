"""/v1/chat/completions: the messages' prompt, answered; what is in the answers besides text."""

import pytest

CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is it?"}],
        "temperature": 0, "max_tokens": 16}


def as_text(served, **fields) -> dict:
    """The same prompt, answered by /v1/completions."""
    ids = served.post("/tokenize", {"messages": CHAT["messages"]}).json["tokens"]
    return served.post("/v1/completions", {"prompt": ids, "temperature": 0, "max_tokens": 16} | fields).json


def test_an_answer_is_that_to_the_prompt_of_its_messages(served):
    whole = served.post("/v1/chat/completions", CHAT).json
    text = as_text(served)
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": text["choices"][0]["text"]}
    assert choice["finish_reason"] == text["choices"][0]["finish_reason"] == "length"
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny" and whole["usage"] == text["usage"]


def test_a_stream_says_what_the_whole_answer_does(served):
    """The first piece of each choice has the role, the last one the reason of the end, and usage comes after all."""
    asked = CHAT | {"n": 2, "temperature": 1, "seed": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    whole = served.post("/v1/chat/completions", asked).json
    events = served.post("/v1/chat/completions", asked | {
        "stream": True, "stream_options": {"include_usage": True}}).events
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert {each["object"] for each in events} == {"chat.completion.chunk"}
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for choice in whole["choices"]:
        pieces = [piece for event in events for piece in event["choices"] if piece["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert [each["finish_reason"] for each in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        assert "".join(each["delta"].get("content") or "" for each in pieces) == choice["message"]["content"]
        assert sum((each["token_ids"] for each in pieces), []) == choice["token_ids"]
        content = [token for each in pieces for token in (each["logprobs"] or {"content": []})["content"]]
        assert [each["token"] for each in content] == [each["token"] for each in choice["logprobs"]["content"]]


def test_the_stop_string_that_ended_an_answer_is_named(served):
    (free,) = served.post("/v1/chat/completions", CHAT).json["choices"]
    stop = free["message"]["content"][4:6]
    asked = CHAT | {"stop": ["never there", stop]}
    (choice,) = served.post("/v1/chat/completions", asked).json["choices"]
    (last,) = served.post("/v1/chat/completions", asked | {"stream": True}).events[-1]["choices"]
    assert free["stop_reason"] is None and choice["stop_reason"] == last["stop_reason"] == stop


def test_log_probabilities_have_bytes_and_the_likeliest(served):
    """The same numbers as those of a completion; the bytes of all tokens together are those of the text."""
    (choice,) = served.post("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 3}).json["choices"]
    of_text = as_text(served, logprobs=3)["choices"][0]["logprobs"]
    content = choice["logprobs"]["content"]
    assert [each["token"] for each in content] == of_text["tokens"]
    assert [each["logprob"] for each in content] == pytest.approx(of_text["token_logprobs"], abs=1e-4)
    assert all([each["logprob"] for each in one["top_logprobs"]] == sorted(
        (each["logprob"] for each in one["top_logprobs"]), reverse=True) for one in content)
    assert all(len(one["top_logprobs"]) == 3 and one["top_logprobs"][0]["bytes"] == one["bytes"] for one in content)
    spelled = bytes(byte for one in content for byte in one["bytes"])
    assert spelled.decode(errors="replace") == choice["message"]["content"]


def test_without_a_length_an_answer_may_be_as_long_as_there_is_room(served):
    """Its length is that of the model unless the request says otherwise, by either name."""
    messages = [{"role": "user", "content": "12 " * 4040}]
    found = served.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "ignore_eos": True}).json
    assert 3900 < found["usage"]["prompt_tokens"] < 4096 and found["usage"]["total_tokens"] == 4096
    either = served.post("/v1/chat/completions", CHAT | {"max_completion_tokens": 3, "max_tokens": 9}).json
    assert either["usage"]["completion_tokens"] == 3
