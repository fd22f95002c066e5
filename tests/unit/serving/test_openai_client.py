"""The package `openai` as its users call it."""

import openai
import pytest

MESSAGES = [{"role": "user", "content": "what is it?"}]


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_chats(client):
    asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(text) > 0
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.content) == 12


def test_completions(client):
    asked = {"model": "tiny", "prompt": ["what", "is"], "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=1, echo=True)
    streamed = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == ["what" + streamed[0], "is" + streamed[1]]
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    extra = client.completions.create(**asked, extra_body={"return_token_ids": True, "top_k": 1})
    assert len(extra.choices[0].token_ids) == 6


def test_errors(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nope", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.request_id


def test_a_stream_that_is_left_is_stopped(client, served):
    stopped = served.metric("vllm:request_success_total", finished_reason="abort")
    with client.completions.create(model="tiny", prompt="what", max_tokens=4000, stream=True,
                                   extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    served.wait_until_idle()
    assert served.metric("vllm:request_success_total", finished_reason="abort") == stopped + 1
