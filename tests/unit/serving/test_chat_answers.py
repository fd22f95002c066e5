"""Answers of chats, as they come: reasoning, text and tool calls, however the tokens are cut, and back to a prompt."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_tokenizers import ALL, V3, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import V3_MTP, engine, loaded

from megatron_deepseek.data.tokenizer import EOD, USER, build_tokenizer
from megatron_deepseek.finetuning.templates import END_THINK, THINK
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.stop_strings import StopStrings
from megatron_deepseek.inference.text import AnswerText
from megatron_deepseek.serving.chat import ChatFormat

QUESTION = {"role": "user", "content": "Q"}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g_2")]
CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def fenced(*calls: tuple[str, str]) -> str:
    written = (f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{END_CALL}" for name, arguments in calls)
    return CALLS + "\n".join(written) + END_CALLS


def bare(*calls: tuple[str, str]) -> str:
    return CALLS + "".join(f"{CALL}{name}{SEP}{arguments}{END_CALL}" for name, arguments in calls) + END_CALLS


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    top = Path(tmp_path_factory.mktemp("answers"))
    return {"all": write_tokenizer(top / "all"), "v3": write_tokenizer(top / "v3", V3)}


@pytest.fixture(scope="module")
def formats(folders) -> dict[str, ChatFormat]:
    """The four families, each with a tokenizer that its models have, and V3's where tags are tokens."""
    of = {"deepseek-v2": "v3", "deepseek-v3": "v3", "deepseek-r1": "all", "deepseek-v3.1": "all"}
    made = {name: ChatFormat.of(build_tokenizer("HuggingFaceTokenizer", folders[which]), folders[which], name)
            for name, which in of.items()}
    tagged = build_tokenizer("HuggingFaceTokenizer", folders["all"])
    return made | {"tagged": ChatFormat.of(tagged, folders["all"], "deepseek-v3")}


def outputs(tokenizer, prompt, tokens, stop=(), reason="stop", every: int = 1) -> list[Output]:
    """What an engine gives while these tokens come, the last an end of text: text as far as it is settled."""
    text, found = AnswerText(tokenizer, tuple(prompt), StopStrings(stop) if stop else None), []
    for number, token in enumerate(tokens, 1):
        ended = token == tokenizer.eod and number == len(tokens)
        stopped = ended or text.add(token)
        finished = stopped or number == len(tokens)
        if finished and not text.finished:
            text.end()
        if finished or number % every == 0:
            why = ("stop" if stopped else reason) if finished else None
            ends = text.ends + [len(text.text)] * (number - len(text.ends))
            found.append(Output("request", 0, tuple(prompt), list(tokens[:number]), text.settled, ends, why))
        if finished:
            break
    return found


def parsed(format: ChatFormat, text: str | list[int], body: dict | None = None, **how):
    """The deltas of each step, the message and the reason, of an answer that is `text` and an end."""
    question = format.question({"messages": [QUESTION]} | (body or {}))
    tokenizer = format.tokenizer
    tokens = text if isinstance(text, list) else [*tokenizer.encode(text), tokenizer.eod]
    parser, steps = question.parser(), []
    for output in outputs(tokenizer, question.prompt, tokens, **how):
        steps.append([delta.fields() for delta in parser.update(output)])
    return steps, parser.message(), parser.finish_reason(output)


def without_ids(message: dict) -> dict:
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return {key: value for key, value in message.items() if key not in ("role", "tool_calls")} | (
        {"calls": calls} if calls else {})


ANSWERS = [
    ("deepseek-v3", {}, "hello\n\n there ", {"content": "hello\n\n there "}),
    ("deepseek-v3", {}, "", {"content": ""}),
    ("deepseek-v3", {}, "<think>\nhm\n\nso\n</think>\n\nyes", {"content": "yes", "reasoning_content": "hm\n\nso"}),
    ("deepseek-v3", {}, "a <think>hm</think>", {"content": "a <think>hm</think>"}),
    ("deepseek-v2", {}, " <think>\nhm < so\n</think>\n\nyes\n", {"content": "yes\n", "reasoning_content": "hm < so"}),
    ("deepseek-v2", {}, " <thin", {"content": " <thin"}),
    ("tagged", {}, "<think>\nhm\n</think>\n\nyes", {"content": "yes", "reasoning_content": "hm"}),
    ("tagged", {}, "</think>\n\nyes", {"content": "yes"}),
    ("deepseek-r1", {}, "hm\n</think>\n\nyes\n", {"content": "yes\n", "reasoning_content": "hm"}),
    ("deepseek-r1", {}, "\n\nhm \n</think>", {"content": None, "reasoning_content": "hm "}),
    ("deepseek-r1", {}, "hm\n\n", {"content": None, "reasoning_content": "hm"}),
    ("deepseek-r1", {}, "\n</think>\n\nyes", {"content": "yes"}),
    ("deepseek-r1", {}, "<think>\nhm\n</think>yes", {"content": "yes", "reasoning_content": "hm"}),
    ("deepseek-v3.1", {}, "yes </think>", {"content": "yes </think>"}),
    ("deepseek-v3.1", {"thinking": True}, "\nhm\n</think>\nyes", {"content": "\nyes", "reasoning_content": "\nhm\n"}),
    ("deepseek-v3", {"tools": TOOLS}, fenced(("f", '{"a": 1}')), {"content": None, "calls": [("f", '{"a": 1}')]}),
    ("deepseek-v3", {"tools": TOOLS}, "so:" + fenced(("f", '{"a": "```\n"}'), ("g_2", "{}")),
     {"content": "so:", "calls": [("f", '{"a": "```\n"}'), ("g_2", "{}")]}),
    ("deepseek-r1", {"tools": TOOLS}, "hm\n</think>\n\n" + fenced(("f", "{}")),
     {"content": None, "reasoning_content": "hm", "calls": [("f", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS}, "so" + bare(("f", '{"a":\n {"b": "}"}}'), ("g_2", "{}")),
     {"content": "so", "calls": [("f", '{"a":\n {"b": "}"}}'), ("g_2", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS, "thinking": True}, "hm</think>" + bare(("f", "{}")),
     {"content": None, "reasoning_content": "hm", "calls": [("f", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS}, bare(("f", "{}")) + "and more",
     {"content": "and more", "calls": [("f", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS, "parallel_tool_calls": False}, bare(("f", "{}"), ("g_2", "{}")),
     {"content": None, "calls": [("f", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS}, bare(("f", "{}")) + "x" + bare(("g_2", "{}")),
     {"content": "x", "calls": [("f", "{}"), ("g_2", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS}, bare(("f", '{"a": 1} \n')), {"content": None, "calls": [("f", '{"a": 1} \n')]}),
    # what is not a call is text, all of it
    ("deepseek-v3.1", {}, bare(("f", "{}")), {"content": bare(("f", "{}"))}),
    ("deepseek-v3.1", {"tools": TOOLS, "tool_choice": "none"}, bare(("f", "{}")), {"content": bare(("f", "{}"))}),
    ("deepseek-v3.1", {"tools": TOOLS}, f"a{CALLS}b", {"content": f"a{CALLS}b"}),
    ("deepseek-v3.1", {"tools": TOOLS}, CALLS + END_CALLS, {"content": CALLS + END_CALLS}),
    ("deepseek-v3.1", {"tools": TOOLS}, bare(("f g", "{}")), {"content": bare(("f g", "{}"))}),
    ("deepseek-v3.1", {"tools": TOOLS}, bare(("f", "no")), {"content": bare(("f", "no"))}),
    ("deepseek-v3.1", {"tools": TOOLS}, f"{CALLS}{CALL}f{END_CALL}", {"content": f"{CALLS}{CALL}f{END_CALL}"}),
    ("deepseek-v3.1", {"tools": TOOLS}, f"{CALLS}{CALL}{'f' * 300}", {"content": f"{CALLS}{CALL}{'f' * 300}"}),
    ("deepseek-v3", {"tools": TOOLS}, bare(("f", "{}")), {"content": bare(("f", "{}"))}),
    ("deepseek-v3", {"tools": TOOLS}, fenced(("f", "[1]")), {"content": fenced(("f", "[1]"))}),
    ("deepseek-v3", {"tools": TOOLS}, fenced(("f", "{}")).replace("```json", "json"),
     {"content": fenced(("f", "{}")).replace("```json", "json")}),
    ("deepseek-v3", {"tools": TOOLS}, fenced(("f", "{}"), ("g", "no")),
     {"content": f"\n{CALL}function{SEP}g\n```json\nno\n```{END_CALL}{END_CALLS}", "calls": [("f", "{}")]}),
    # ends that the model forgot
    ("deepseek-v3", {"tools": TOOLS}, fenced(("f", "{}")).removesuffix(END_CALL + END_CALLS),
     {"content": None, "calls": [("f", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS}, bare(("f", "{}")).replace(END_CALL, ""),
     {"content": None, "calls": [("f", "{}")]}),
    ("deepseek-v3.1", {"tools": TOOLS}, bare(("f", "{}"), ("g_2", "{}")).replace(END_CALL, ""),
     {"content": None, "calls": [("f", "{}"), ("g_2", "{}")]}),
]


@pytest.mark.parametrize("name, body, text, expected", ANSWERS)
@pytest.mark.parametrize("every", [1, 3, 1000])
def test_answers(formats, name, body, text, expected, every):
    """The same whether each token is seen or several at once; deltas have one thing each and add up to the message."""
    steps, message, reason = parsed(formats[name], text, body, every=every)
    assert without_ids(message) == expected
    assert reason == ("tool_calls" if "calls" in expected else "stop")
    content, reasoning, calls = "", "", {}
    for fields in (fields for step in steps for fields in step):
        assert len(fields) == 1 and set(fields) < {"content", "reasoning_content", "tool_calls"}
        content, reasoning = content + fields.get("content", ""), reasoning + fields.get("reasoning_content", "")
        for call in fields.get("tool_calls", ()):
            function = call["function"]
            begun = calls.setdefault(call["index"], {"id": call.get("id"), "name": function.get("name"), "a": ""})
            begun["a"] += function["arguments"]
    assert (content or None, reasoning or None) == (message["content"] or None, message.get("reasoning_content"))
    assert [(call["id"], call["name"], call["a"]) for call in calls.values()] == [
        (call["id"], call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert len({call["id"] for call in calls.values()}) == len(calls)


def test_pieces_come_as_soon_as_they_can(formats):
    """Text and arguments with each token, a call once its arguments begin; nothing is held but what may be layout."""
    said = "hm\nso it is\n</think>\n\nyes it is" + fenced(("f", '{"a": 12}'))
    steps, _, _ = parsed(formats["deepseek-r1"], said, {"tools": TOOLS})
    flat = [fields for step in steps for fields in step]
    kinds = [next(iter(fields)) for fields in flat]
    assert kinds == sorted(kinds, key=["reasoning_content", "content", "tool_calls"].index)
    assert kinds.count("reasoning_content") > 2 and kinds.count("content") > 1 and kinds.count("tool_calls") > 3
    first, *others = (fields["tool_calls"][0] for fields in flat if "tool_calls" in fields)
    assert first["function"]["name"] == "f" and first["id"].startswith("call_") and first["type"] == "function"
    assert not any("id" in call or "name" in call["function"] for call in others)


def test_the_letters_of_a_token_are_text(formats):
    """Only the token itself ends the reasoning, or begins calls."""
    format = formats["deepseek-r1"]
    tokenizer = format.tokenizer
    spelled = [token for piece in ("hm <", "/think> so", "\n") for token in tokenizer.encode(piece)]
    (end,) = tokenizer.encode(END_THINK)
    letters = [token for piece in (CALLS[:5], CALLS[5:]) for token in tokenizer.encode(piece)]
    _, message, _ = parsed(format, [*spelled, end, *letters, tokenizer.eod], {"tools": TOOLS})
    assert message == {"role": "assistant", "content": CALLS, "reasoning_content": "hm </think> so"}


@pytest.mark.parametrize("stop, reasoning, content", [
    ("so", "hm ", None), ("\n</think>", "hm so", None), ("nk>\n\nyes", "hm so\n</thi", None),
    (">", "hm so\n</think", None), ("\n\nno", "hm so", "yes and"), ("s a", "hm so", "ye"),
    ("no", "hm so", "yes and\n\n"),
    ("nk>zzz", "hm so", "yes and\n\nno"), ("\n</think>\n\nyet", "hm so", "yes and\n\nno")])
def test_stop_strings(formats, stop, reasoning, content):
    """What may become one is held back, also where it begins in a token's text, which then is no token."""
    steps, message, reason = parsed(formats["deepseek-r1"], "hm so\n</think>\n\nyes and\n\nno", stop=[stop])
    assert without_ids(message) == {"content": content, "reasoning_content": reasoning} and reason == "stop"
    streamed = "".join(fields.get("content", "") for step in steps for fields in step)
    assert streamed == (content or "")


def test_a_stop_string_in_a_token_that_begins_calls(formats):
    """What is left of the token is text, and begins nothing."""
    _, message, _ = parsed(formats["deepseek-v3.1"], f"so{bare(('f', '{}'))}", {"tools": TOOLS}, stop=["begin"])
    assert message["content"] == "so<｜tool▁calls▁" and "tool_calls" not in message


def test_characters_in_pieces(formats):
    """None is cut; what never becomes one is shown before the token behind it, and at the end."""
    format = formats["deepseek-r1"]
    tokenizer = format.tokenizer
    encoded = tokenizer.encode("天𝄞")
    (end,) = tokenizer.encode(END_THINK)
    steps, message, _ = parsed(format, [*encoded, encoded[-2], end, *encoded, encoded[0], tokenizer.eod])
    assert message["reasoning_content"] == "天𝄞\ufffd" and message["content"] == "天𝄞\ufffd"
    shown = [text for step in steps for fields in step for text in fields.values()]
    assert not any("\ufffd" in text and "\ufffd" != text for text in shown) and len(encoded) > 5


def test_a_cut_answer(formats):
    """By its length: reasoning alone, half a call, the beginning of one."""
    tokenizer = formats["deepseek-v3.1"].tokenizer
    for name, body, text, expected in (
            ("deepseek-r1", {}, "hm", {"content": None, "reasoning_content": "hm"}),
            ("deepseek-v3.1", {"tools": TOOLS}, f'{CALLS}{CALL}f{SEP}{{"a": "b ', {"content": None, "calls": [
                ("f", '{"a": "b ')]}),
            ("deepseek-v3.1", {"tools": TOOLS}, f"{CALLS}{CALL}f", {"content": f"{CALLS}{CALL}f"})):
        _, message, reason = parsed(formats[name], tokenizer.encode(text), body, reason="length")
        assert without_ids(message) == expected and reason == "length"


# Round trips ----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab \n.,:<>`{}\"/天é0"), min_size=1, max_size=12)
INNER = TEXT.map(lambda text: text.strip("\n")).filter(lambda text: text.strip() and "think>" not in text)
ARGUMENTS = st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.lists(TEXT, max_size=2)), max_size=2)


@settings(deadline=None, max_examples=120)
@given(name=st.sampled_from(["deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1", "tagged"]),
       reasoning=st.none() | INNER, content=INNER, calls=st.lists(st.tuples(st.sampled_from(["f", "g_2"]), ARGUMENTS),
                                                                  max_size=3), every=st.integers(1, 5))
def test_an_answer_is_the_message_that_renders_to_it(formats, name, reasoning, content, calls, every):
    """render(message) begins with the prompt and goes on with the answer, whose parts are the message again."""
    format = formats[name]
    calls = [] if name == "deepseek-v2" else calls
    message = {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
    if calls:
        message["tool_calls"] = [{"function": {"name": each, "arguments": json.dumps(arguments, ensure_ascii=False)}}
                                 for each, arguments in calls]
    body = {"messages": [QUESTION], "thinking": bool(reasoning)} | ({"tools": TOOLS} if calls else {})
    prompt = list(format.question(body).prompt)
    whole = list(format.question(body | {"messages": [QUESTION, message], "add_generation_prompt": False}).prompt)
    if name == "deepseek-v2":  # the blank behind "Assistant:" belongs to the answer's first token
        text = format.tokenizer.decode(whole)[len(format.tokenizer.decode(prompt)):].removesuffix(EOD)
        answer = [*format.tokenizer.encode(text), format.tokenizer.eod]
        content = content if reasoning else f" {content}"
    else:
        assert whole[:len(prompt)] == prompt
        answer = whole[len(prompt):]
    _, found, _ = parsed(format, answer, body, every=every)
    assert without_ids(found) == without_ids(message | {"content": content})
    again = message | {key: value for key, value in found.items() if name != "deepseek-v2" or key != "content"}
    assert list(format.question(body | {"messages": [QUESTION, again], "add_generation_prompt": False}).prompt) == whole


# With an engine -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(meshes, formats):
    tokenizer = formats["deepseek-v3.1"].tokenizer
    config = replace(V3_MTP, vocab_size=tokenizer.vocab_size, max_position_embeddings=1200)
    return loaded(config, meshes, tokenizer=tokenizer, eos_ids=(tokenizer.eod,))


FORCED = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"],
    "additionalProperties": False}}} for name in ("f", "g_2")]


@pytest.mark.parametrize("name, thinking", [("deepseek-v3.1", False), ("deepseek-v3.1", True), ("deepseek-r1", True),
                                            ("tagged", False)])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g_2"}}, "none"])
def test_what_a_random_model_says_to_a_tool_choice(formats, model, name, thinking, choice):
    """Calls of the tools, whose arguments follow their schemas; of the named one a single call; or none at all."""
    question = formats[name].question({"messages": [QUESTION], "tools": FORCED, "tool_choice": choice,
                                       "thinking": thinking})
    control = formats[name].form.control
    bias = {control[END_THINK]: 25.0, control[END_CALLS]: 4.0, control[CALLS]: 4.0, formats[name].tokenizer.eod: 8.0,
            control[CALL]: 15.0 if isinstance(choice, dict) else 0.0}
    for seed in range(3):
        parameters = SamplingParameters(max_tokens=20 if choice == "none" else 700, seed=seed, logit_bias=bias)
        ((output,),) = engine(model, max_length=1200).generate([question.prompt], question.sampling(parameters))
        parser = question.parser()
        parser.update(output)
        calls = parser.message().get("tool_calls", [])
        if choice == "none":
            assert not calls and CALLS not in output.text
            assert question.sampling(parameters).logit_bias[control[CALLS]] == float("-inf")
            continue
        assert parser.finish_reason(output) == "tool_calls" and parser.message()["content"] is None, output.text
        for call in calls:
            assert 0 <= json.loads(call["function"]["arguments"])["n"] <= 99
        names = {call["function"]["name"] for call in calls}
        assert output.text.rpartition(CALLS)[2].count(CALL) == len(calls)
        assert names <= {"f", "g_2"} if choice == "required" else (names == {"g_2"} and len(calls) == 1)


@pytest.mark.parametrize("name", ["deepseek-v3.1", "tagged"])
def test_strict_tools_of_a_random_model(formats, model, name):
    """Once it calls, calls are whole and follow the schema; it may as well say something, and end."""
    strict = [{**FORCED[0], "function": FORCED[0]["function"] | {"strict": True}}, FORCED[1]]
    question = formats[name].question({"messages": [QUESTION], "tools": strict})
    control, called = formats[name].form.control, 0
    begin = 5.0 if name == "deepseek-v3.1" else 9.0
    bias = {control[CALLS]: begin, control[END_CALLS]: 5.0, formats[name].tokenizer.eod: 5.0}
    for seed in range(8):
        ((output,),) = engine(model, max_length=1200).generate([question.prompt], question.sampling(
            SamplingParameters(max_tokens=900, seed=seed, logit_bias=bias)))
        parser = question.parser()
        parser.update(output)
        calls = parser.message().get("tool_calls", [])
        assert output.finish_reason == "stop" and (CALLS in output.text) == bool(calls)
        for call in calls:
            found = json.loads(call["function"]["arguments"])
            assert call["function"]["name"] in ("f", "g_2") and isinstance(found, dict)
            assert call["function"]["name"] == "g_2" or 0 <= found["n"] <= 99
        called += bool(calls)
    assert 0 < called < 8


def test_json_behind_reasoning(formats, model):
    """The schema holds from the end of the reasoning on; without reasoning from the first token."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}
    body = {"messages": [QUESTION], "response_format": {"type": "json_schema", "json_schema": {
        "name": "answer", "schema": schema}}}
    for name, thinking in (("deepseek-r1", True), ("deepseek-v3.1", True), ("deepseek-v3.1", False)):
        question = formats[name].question(body | {"thinking": thinking})
        bias = {formats[name].form.control[END_THINK]: 7.0, formats[name].tokenizer.eod: 9.0}
        ((output,),) = engine(model, max_length=1200).generate([question.prompt], question.sampling(
            SamplingParameters(max_tokens=700, seed=1, logit_bias=bias)))
        parser = question.parser()
        parser.update(output)
        assert json.loads(parser.message()["content"])["ok"] in (True, False)
        assert ("reasoning_content" in parser.message()) == thinking
    assert THINK not in output.text and USER not in output.text and len(ALL) > len(V3)
