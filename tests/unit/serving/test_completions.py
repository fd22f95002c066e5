"""/v1/completions: the engine's own answers, whole and streamed, and a prompt's log-probabilities."""

import pytest
import torch
from small_engines import uncached_logits

from megatron_deepseek.inference.sampling_parameters import SamplingParameters

PROMPTS = ["what is it?", "Assistant: yes, User: no", "北京 天气 is"]
GREEDY = {"temperature": 0, "max_tokens": 24}


def complete(served, prompt, **fields) -> dict:
    answer = served.post("/v1/completions", GREEDY | {"prompt": prompt} | fields)
    assert answer.status == 200, answer.content
    return answer.json


def joined(events: list[dict], number: int) -> dict[int, dict]:
    """The choices of a stream put together: texts, lists of log-probabilities and ids one after the other."""
    choices: dict[int, dict] = {}
    for event in events:
        for piece in event["choices"]:
            whole = choices.setdefault(piece["index"], {"text": "", "token_ids": [], "logprobs": {}, "reasons": [],
                                                       "stop_reasons": []})
            whole["text"] += piece["text"]
            whole["token_ids"] += piece.get("token_ids") or []
            whole["reasons"].append(piece["finish_reason"])
            whole["stop_reasons"].append(piece["stop_reason"])
            for name, values in (piece["logprobs"] or {}).items():
                whole["logprobs"].setdefault(name, []).extend(values)
    assert len(choices) == number
    assert all(set(each["reasons"][:-1]) <= {None} and each["reasons"][-1] for each in choices.values())
    return choices


@pytest.mark.parametrize("stream", [False, True])
def test_greedy_text_is_the_engines(served, engine, stream):
    """Of several prompts in one request, as texts and as ids, with the numbers of choices in the order of prompts."""
    expected = engine.generate(PROMPTS, SamplingParameters(temperature=0, max_tokens=24))
    for prompts in (PROMPTS, [list(engine.check(each, SamplingParameters())) for each in PROMPTS]):
        asked = GREEDY | {"prompt": prompts, "stream": stream, "return_token_ids": True}
        answer = served.post("/v1/completions", asked)
        choices = joined(answer.events, 3) if stream else {each["index"]: each for each in answer.json["choices"]}
        for number, (output,) in enumerate(expected):
            assert choices[number]["text"] == output.text
            assert choices[number]["token_ids"] == output.tokens


def test_each_of_n_answers_is_the_engines(served, engine):
    sampling = {"temperature": 1.5, "top_k": 40, "min_p": 0.01, "seed": 5, "n": 3, "max_tokens": 12}
    expected = engine.generate(PROMPTS[:2], SamplingParameters(**sampling))
    found = served.post("/v1/completions", {"prompt": PROMPTS[:2], **sampling}).json
    assert [each["text"] for each in found["choices"]] == [each.text for answers in expected for each in answers]
    assert [each["index"] for each in found["choices"]] == [*range(6)]
    assert len({each["text"] for each in found["choices"]}) == 6
    prompt_tokens = sum(len(answers[0].prompt) for answers in expected)
    tokens = sum(len(each.tokens) for answers in expected for each in answers)
    assert found["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": tokens,
                              "total_tokens": prompt_tokens + tokens}


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echoed_logprobs_are_the_models(served, engine, max_tokens):
    """As lm-eval reads them: of the prompt, whose first token has none, then of the new tokens; by the training model's
    forward of the whole text, to what float32 can.
    """
    (choice,) = complete(served, PROMPTS[0], echo=True, logprobs=2, max_tokens=max_tokens,
                         return_token_ids=True)["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    expected = uncached_logits(engine.loaded.stage, ids).log_softmax(-1)
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(PROMPTS[0]) and len(choice["token_ids"]) == max_tokens
    assert {len(values) for values in logprobs.values()} == {len(ids)}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for place, token in enumerate(ids[1:]):
        assert logprobs["token_logprobs"][place + 1] == pytest.approx(float(expected[place, token]), abs=1e-4)
        likeliest = sorted(expected[place].topk(2).values.tolist())
        top = sorted(logprobs["top_logprobs"][place + 1].values())
        assert top[-2:] == pytest.approx(likeliest, abs=1e-4) and len(top) <= 3
        assert logprobs["tokens"][place + 1] in logprobs["top_logprobs"][place + 1]


def test_streams_say_what_whole_answers_do(served):
    asked = {"prompt": PROMPTS, "n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 20, "logprobs": 1, "echo": True,
             "return_token_ids": True}
    whole = served.post("/v1/completions", asked).json
    events = served.post("/v1/completions", asked | {
        "stream": True, "stream_options": {"include_usage": True}}).events
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(each["usage"] is None for each in events[:-1]) and len({each["id"] for each in events}) == 1
    streamed = joined(events, 6)
    for choice in whole["choices"]:
        assert {name: streamed[choice["index"]][name] for name in ("text", "token_ids")} == {
            name: choice[name] for name in ("text", "token_ids")}
        for name, values in choice["logprobs"].items():
            assert len(values) == len(streamed[choice["index"]]["logprobs"][name])
        assert streamed[choice["index"]]["logprobs"]["tokens"] == choice["logprobs"]["tokens"]
        assert streamed[choice["index"]]["logprobs"]["text_offset"] == choice["logprobs"]["text_offset"]


def test_offsets_point_into_the_text(served):
    """Where a token is whole characters its text stands at its offset; tokens in pieces stand where the whole does."""
    for choice in complete(served, PROMPTS, echo=True, logprobs=0, max_tokens=40)["choices"]:
        logprobs, whole = choice["logprobs"], 0
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if not token.startswith("bytes:") and "\ufffd" not in choice["text"][:offset + len(token)]:
                assert choice["text"][offset:offset + len(token)] == token
                whole += 1
        assert whole > 5


def test_stop_strings_are_held_back_and_cut(served, engine):
    (output,), = engine.generate(PROMPTS[:1], SamplingParameters(temperature=0, max_tokens=24))
    place = len(output.text) // 2
    stop = output.text[place:place + 4]
    asked = {"prompt": PROMPTS[0], "stop": ["", stop, "never there"], **GREEDY}
    whole = served.post("/v1/completions", asked).json["choices"][0]
    streamed = joined(served.post("/v1/completions", asked | {"stream": True}).events, 1)[0]
    assert whole["text"] == streamed["text"] == output.text[:output.text.index(stop)]
    assert whole["finish_reason"] == streamed["reasons"][-1] == "stop"
    assert whole["stop_reason"] == streamed["stop_reasons"][-1] == stop


def test_a_streamed_character_is_never_cut(served):
    """The model writes bytes at random: what is no character at its end may stand in the text, but no half of one."""
    asked = {"prompt": PROMPTS[2], "temperature": 2.0, "seed": 1, "max_tokens": 150, "ignore_eos": True}
    whole = served.post("/v1/completions", asked).json["choices"][0]["text"]
    events = served.post("/v1/completions", asked | {"stream": True}).events
    pieces = [each["text"] for event in events for each in event["choices"]]
    assert "".join(pieces) == whole and len(pieces) > 50 and any(ord(each) > 127 for each in whole)


def test_prompt_logprobs_are_by_id(served, engine):
    (choice,) = complete(served, PROMPTS[0], prompt_logprobs=2, return_token_ids=True)["choices"]
    ids, found = choice["prompt_token_ids"], choice["prompt_logprobs"]
    expected = uncached_logits(engine.loaded.stage, ids).log_softmax(-1)
    assert found[0] is None and len(found) == len(ids)
    for place, token in enumerate(ids[1:]):
        values, likeliest = expected[place].topk(2)
        entries = found[place + 1]
        assert entries[str(token)]["logprob"] == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert [entries[str(each)]["rank"] for each in likeliest.tolist()] == [1, 2]
        assert entries[str(int(likeliest[0]))]["logprob"] == pytest.approx(float(values[0]), abs=1e-4)


def test_min_tokens_and_stop_token_ids(served):
    (first,) = complete(served, PROMPTS[0], return_token_ids=True)["choices"]
    end = first["token_ids"][3]
    assert end not in first["token_ids"][:3]
    (stopped,) = complete(served, PROMPTS[0], return_token_ids=True, stop_token_ids=[end])["choices"]
    assert stopped["token_ids"] == first["token_ids"][:4] and stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == end and first["stop_reason"] is None
    (longer,) = complete(served, PROMPTS[0], return_token_ids=True, stop_token_ids=[end], min_tokens=10)["choices"]
    assert len(longer["token_ids"]) >= 10 and longer["token_ids"][3] != end


def test_tokens_named_by_their_ids_are_unique(served):
    (choice,) = complete(served, PROMPTS[0], logprobs=5, return_tokens_as_token_ids=True,
                         return_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{each}" for each in choice["token_ids"]]
    assert all(len(top) in (5, 6) for top in choice["logprobs"]["top_logprobs"])
    assert torch.tensor([max(top.values()) for top in choice["logprobs"]["top_logprobs"]]).tolist() == pytest.approx(
        choice["logprobs"]["token_logprobs"])
