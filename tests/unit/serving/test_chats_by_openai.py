"""Tools, reasoning and answers of a given form over HTTP, as users of the package `openai` have them."""

import json

import openai
import pytest

MESSAGES = [{"role": "user", "content": "what is it?"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99},
                                           "kind": {"enum": ["a", "b c"]}},
          "required": ["n", "kind"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "description": "D", "parameters": SCHEMA}}
         for name in ("get", "put")]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 800, "temperature": 1.0}


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def of_schema(arguments: str) -> None:
    found = json.loads(arguments)
    assert set(found) == {"n", "kind"} and 0 <= found["n"] <= 99 and found["kind"] in ("a", "b c")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calls_streamed_and_whole(client, seed):
    """Deltas add up to the calls of the whole answer, which go back into the chat with their results."""
    asked = ASKED | {"tools": TOOLS, "tool_choice": "required", "seed": seed}
    (whole,) = client.chat.completions.create(**asked).choices
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    names, arguments, reasons = {}, {}, []
    for chunk in client.chat.completions.create(**asked, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.function.name:
                assert call.id and call.type == "function" and call.index == len(names)
                names[call.index] = call.function.name
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
        reasons.append(chunk.choices[0].finish_reason)
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])
    for place, call in enumerate(whole.message.tool_calls):
        of_schema(call.function.arguments)
        assert (names[place], arguments[place]) == (call.function.name, call.function.arguments)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12"} for call in whole.message.tool_calls]
    again = client.chat.completions.create(**ASKED | {
        "messages": [*MESSAGES, whole.message.model_dump(exclude_none=True), *results], "max_tokens": 4})
    assert again.usage.prompt_tokens > len(results) * 4


def test_a_named_tool(client):
    (choice,) = client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice={
        "type": "function", "function": {"name": "put"}}).choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "put"
    of_schema(call.function.arguments)


def test_json_behind_reasoning(client, served):
    """V3.1 thinks when it is asked to; the schema holds for what comes behind, and deltas never have both."""
    (end,) = served.post("/tokenize", {"prompt": "</think>"}).json["tokens"]
    asked = ASKED | {"logit_bias": {str(end): 8}, "extra_body": {"chat_template_kwargs": {"thinking": True}},
                     "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}}
    (whole,) = client.chat.completions.create(**asked, seed=5).choices
    of_schema(whole.message.content)
    reasoning, content = "", ""
    for chunk in client.chat.completions.create(**asked, seed=5, stream=True):
        delta = chunk.choices[0].delta
        thought = getattr(delta, "reasoning_content", None)
        assert not (thought and delta.content)
        reasoning, content = reasoning + (thought or ""), content + (delta.content or "")
    assert (reasoning or None, content) == (getattr(whole.message, "reasoning_content", None), whole.message.content)


def test_completions_of_a_given_form(client):
    for extra, right in (({"guided_regex": "[ab]{4}"}, lambda text: len(text) == 4 and set(text) <= {"a", "b"}),
                         ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
                         ({"structured_outputs": {"json": SCHEMA}}, lambda text: of_schema(text) is None),
                         ({"structured_outputs": {"grammar": 'root ::= "ab" | "cd"'}},
                          lambda text: text in ("ab", "cd")),
                         ({"structured_outputs": {"grammar": 'start: "x" /[0-9]+/ "y"'}},
                          lambda text: text[0] + text[-1] == "xy" and text[1:-1].isdigit())):
        (choice,) = client.completions.create(model="tiny", prompt="what", max_tokens=800, extra_body=extra).choices
        assert choice.finish_reason == "stop" and right(choice.text), extra


@pytest.mark.parametrize("fields, param", [
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"tools": TOOLS, "tool_choice": {"function": {"name": "pet"}}}, "tool_choice.function.name"),
    ({"continue_final_message": True}, "continue_final_message"), ({"guided_regex": "(a"}, "guided_regex")])
def test_the_field_that_is_wrong_is_the_errors_param(served, fields, param):
    answer = served.post("/v1/chat/completions", {"messages": MESSAGES} | fields)
    assert answer.status == 400 and answer.json["error"]["param"] == param
    assert answer.json["error"]["message"].startswith(param)
