"""The files that people have: the same conversation in every format has the same tokens; bad rows say what to do."""

import contextlib
import gzip
import json
from pathlib import Path

import pytest
import zstandard
from chat_tokenizers import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepseek.finetuning.conversation import BadRow, Conversation, ToolCall, Turn
from megatron_deepseek.finetuning.formats import to_conversation
from megatron_deepseek.finetuning.prepare import prepare
from megatron_deepseek.finetuning.prompts import conversations
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.settings import DataSettings
from megatron_deepseek.finetuning.templates import TEMPLATES

THOUGHT = "<think>\nR2\n</think>\n\nA2"
OPENAI = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q1"},
                       {"role": "assistant", "content": "A1"}, {"role": "user", "content": "Q2"},
                       {"role": "assistant", "content": "A2", "reasoning_content": "R2"}]}
SCIENCEONE = {"messages": [*({**message, "loss": "true"} if message["role"] == "assistant" else message
                             for message in OPENAI["messages"][:-1]),
                           {"role": "assistant", "content": THOUGHT, "loss": True}]}
SHAREGPT = {"system": "S", "conversations": [
    {"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}, {"from": "human", "value": "Q2"},
    {"from": "gpt", "value": THOUGHT}]}
ALPACA = {"instruction": "Q2", "input": "", "output": THOUGHT, "history": [["Q1", "A1"]], "system": "S"}
COMPLETION = {"prompt": [{**message, "loss": None} for message in OPENAI["messages"][:-1]],
              "completion": OPENAI["messages"][-1:]}
SWIFT = {"query": "Q2", "response": THOUGHT, "history": [["Q1", "A1"]], "system": "S"}
PARTS = {"messages": [{**message, "content": [{"type": "text", "text": message["content"]}]}
                      for message in OPENAI["messages"]]}
SWIFT_SCALED = {"messages": [{**message, "loss_scale": 1.0} for message in OPENAI["messages"]], "channel": "c"}
ROWS = {"openai": OPENAI, "scienceone": SCIENCEONE, "sharegpt": SHAREGPT, "alpaca": ALPACA, "swift": SWIFT,
        "parts": PARTS, "scaled": SWIFT_SCALED}
WANTED = Conversation((Turn("system", "S"), Turn("user", "Q1"), Turn("assistant", "A1"), Turn("user", "Q2"),
                       Turn("assistant", "A2", "R2")))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_formats(row):
    assert to_conversation(row) == WANTED


def test_of_prompt_and_completion_only_the_completion_is_trained():
    assert [turn.weight for turn in to_conversation(COMPLETION).turns if turn.role == "assistant"] == [0, 1]
    assert to_conversation({"prompt": "Q", "completion": "A"}).turns == (Turn("user", "Q"), Turn("assistant", "A"))


def test_alpacas_input_is_a_line_of_its_own():
    row = {"instruction": "Q", "input": "more", "output": "A"}
    assert to_conversation(row).turns[0].content == "Q\nmore"


@pytest.mark.parametrize("loss, weight", [(True, 1), (False, 0), ("false", 0), ("True", 1), (0.5, 0.5), (2, 2)])
def test_loss_of_a_turn(loss, weight):
    for key in ("loss", "loss_scale"):
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", key: loss}]
        assert to_conversation({"messages": messages}).turns[1].weight == weight


TOOL = {"type": "function", "function": {"name": "f", "description": "D", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = {"tools": [TOOL], "messages": [
    {"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "O", "tool_call_id": "1"}, {"role": "assistant", "content": "A"}]}


def test_tool_calls():
    said = json.dumps({"name": "f", "arguments": {"a": 1}})
    sharegpt = {"tools": json.dumps([TOOL["function"]]), "conversations": [
        {"from": "human", "value": "Q"}, {"from": "function_call", "value": said},
        {"from": "function_call", "value": said}, {"from": "observation", "value": "O"},
        {"from": "gpt", "value": "A"}]}
    calls = (ToolCall("f", '{"a": 1}'),) * 2
    wanted = Conversation((Turn("user", "Q"), Turn("assistant", "", None, calls), Turn("tool", "O"),
                           Turn("assistant", "A")), (TOOL["function"],))
    assert to_conversation(CALLS) == to_conversation(sharegpt) == wanted


def user(text="Q"):
    return {"role": "user", "content": text}


def assistant(text="A", **more):
    return {"role": "assistant", "content": text} | more


@pytest.mark.parametrize("row, message", [
    ([1], "a row must be an object"),
    ({"text": "x"}, "the row has none of the keys messages, conversations, .*; it has 'text'"),
    ({"messages": [user(), assistant()], "conversations": []}, "both messages and conversations; remove one"),
    ({"messages": [user(), assistant()], "images": ["x.png"]}, "the key images holds images or sound"),
    ({"messages": [user([{"type": "image_url"}]), assistant()]}, "1 holds a part of the type 'image_url', which"),
    ({"messages": [user([{"type": "\x1e"}]), assistant()]}, r"holds a part of the type '\\x1e'"),
    ({"messages": []}, "there are no messages"),
    ({"messages": [assistant(), user()]}, "message 1 has the role assistant at the beginning, where only user can"),
    ({"messages": [user(), user()]}, "message 2 has the role user after the role user, where only assistant"),
    ({"messages": [user(), assistant(), assistant()]}, "message 3 has the role assistant after the role assistant"),
    ({"messages": [user()]}, "the last message is of the role user"),
    ({"messages": [user(" "), assistant()]}, r"message 1 \(user\) is empty"),
    ({"messages": [user(), assistant("")]}, r"message 2 \(assistant\) is empty"),
    ({"messages": [{"role": "user"}, assistant()]}, "message 1 has no content"),
    ({"messages": [{"content": "x"}, assistant()]}, "message 1 has no role"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "message 1 has the role 'boss', which is none of system, "),
    ({"messages": [user(), {"role": "tool", "content": "x"}]}, "message 2 is a tool's result, but the assistant has"),
    ({"messages": [user(), assistant(tool_calls=[{"function": {"name": "f"}}]), user(), assistant()]},
     "message 3 is the user's, but the tool calls before it have no results"),
    ({"messages": [user(), assistant(tool_calls=[{"function": {}}])]}, "a tool call without a function's name"),
    ({"messages": [user(), assistant(loss="no")]}, "message 2 has the loss 'no'; it must be true, false, or a weight"),
    ({"messages": [user(), assistant(loss=-1)]}, "message 2 has the loss -1"),
    ({"messages": [user(), assistant("<think>a</think>b", reasoning_content="c")]}, "reasoning_content and a <think>"),
    ({"messages": [user(), assistant(3)]}, "message 2 must hold text, not a value of the type int"),
    ({"messages": [user(), assistant("\ud800")]}, "message 2 holds half a surrogate pair"),
    ({"instruction": "Q"}, "the row has instruction but no output or response"),
    ({"prompt": "Q"}, "the row has prompt but no completion or response"),
    ({"query": "Q", "response": "A", "history": ["x"]}, r"history must be a list of \[question, answer\]"),
    ({"messages": [user(), assistant()], "tools": "{"}, "the tools must be JSON"),
    ({"messages": [{"role": "system", "content": "S"}, user(), assistant()], "system": "T"}, "remove one of them"),
])
def test_bad_rows(row, message):
    with pytest.raises(BadRow, match=message):
        to_conversation(row)


ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
                        lambda inner: (st.lists(inner, max_size=2)
                                       | st.dictionaries(st.text(max_size=3), inner, max_size=2)), max_leaves=3)


def places(value, path=()):
    """Yield the path of everything within a row."""
    yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*path, key))


def replaced(value, path, other):
    if not path:
        return other
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], other)
    return changed


TEXTS = st.text(st.sampled_from("ab \n<>é天\""), min_size=1, max_size=8).filter(str.strip)
TALKS = st.lists(st.tuples(TEXTS, st.none() | TEXTS, TEXTS), min_size=1, max_size=3)


def written(system, talk) -> dict[str, dict]:
    """Return the row of a conversation in each format: question, reasoning and answer in turn."""
    def inline(reasoning, answer):
        return answer if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n{answer}"

    given, spoken = [], []
    for question, reasoning, answer in talk:
        more = {} if reasoning is None else {"reasoning_content": reasoning}
        given += [user(question), assistant(answer, **more)]
        spoken += [("human", question), ("gpt", inline(reasoning, answer))]
    first = [] if system is None else [{"role": "system", "content": system}]
    pairs = [(question, inline(*answer)) for question, *answer in talk]
    (*history, (question, answer)), more = pairs, {} if system is None else {"system": system}
    return {
        "openai": {"messages": first + given},
        "inline": {"messages": first + [{"role": {"human": "user", "gpt": "assistant"}[role], "content": text}
                                        for role, text in spoken]},
        "sharegpt": {"conversations": [{"from": role, "value": text} for role, text in spoken]} | more,
        "alpaca": {"instruction": question, "output": answer, "history": [list(pair) for pair in history]} | more,
        "prompt": {"prompt": question, "completion": answer, "history": history} | more,
        "query": {"query": question, "response": answer, "history": history} | more}


@settings(deadline=None, max_examples=100)
@given(system=st.none() | TEXTS, talk=TALKS)
def test_any_conversation_is_the_same_in_every_format(system, talk):
    found = {form: to_conversation(row) for form, row in written(system, talk).items()}
    assert {form: each for form, each in found.items() if each != found["openai"]} == {}


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_row_with_anything_anywhere_is_read_or_refused(data):
    row = data.draw(st.sampled_from([*ROWS.values(), COMPLETION, CALLS]))
    path = data.draw(st.sampled_from(list(places(row))))
    try:
        conversation = to_conversation(replaced(row, path, data.draw(ANYTHING)))
    except BadRow as error:
        assert len(str(error).splitlines()) == 1 and error.reason
        return
    for name in TEMPLATES:
        with contextlib.suppress(BadRow):
            TEMPLATES[name].render(conversation)


# Files ----------------------------------------------------------------------------------------------------------------

def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist(rows), path)


def jsonl(rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


WRITERS = {
    "a.jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "flat.json": lambda path, rows: path.write_text(json.dumps(rows, ensure_ascii=False)),
    "bom.json": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode()),
    "one.json": lambda path, rows: path.write_text("\n".join(json.dumps(row, indent=1) for row in rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(jsonl(rows))),
    "a.json.zst": lambda path, rows: path.write_bytes(zstandard.compress(json.dumps(rows).encode())),
    "a.parquet": write_parquet,
}


def data_settings(tmp_path, *dataset, **options) -> DataSettings:
    tokenizer = tmp_path / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    return DataSettings(**{"dataset": tuple(map(str, dataset)), "tokenizer_model": str(tokenizer), "seq_length": 64,
                           "template": "deepseek-r1", "num_workers": 1} | options)


def samples_of(settings: DataSettings) -> list[tuple[list[int], list[float]]]:
    rows = Rows(prepare(settings, lambda _: None), shuffle=False)
    return [tuple(part.tolist() for part in rows.sample(0, number)) for number in range(rows.samples_per_epoch)]


def test_every_file_and_format_gives_the_same_tokens(tmp_path):
    found = {}
    for form, row in ROWS.items():
        for name in WRITERS if form == "openai" else ["a.jsonl"]:
            path = tmp_path / form / name
            path.parent.mkdir(exist_ok=True)
            WRITERS[name](path, [row] * 3)
            found[form, name] = samples_of(data_settings(tmp_path, path, packing=False))
    first, *others = found.values()
    assert len(first) == 3 and first[0] == first[1]
    assert [key for key, other in zip(list(found)[1:], others) if other != first] == []


def test_dataset_info(tmp_path):
    entries = {
        "plain": {"file_name": "alpaca.json"},
        "named": {"file_name": "named.jsonl", "columns": {"prompt": "q", "response": "a", "system": "s",
                                                          "history": "before"}},
        "chat": {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk", "system": "s"},
                 "tags": {"role_tag": "role", "content_tag": "text", "user_tag": "u", "assistant_tag": "a"}},
        "hub": {"hf_hub_url": "x/y"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA]))
    (tmp_path / "named.jsonl").write_bytes(jsonl([{"q": "Q2", "a": THOUGHT, "s": "S", "before": [["Q1", "A1"]]}]))
    talk = [{"role": tag, "text": text} for tag, text in (("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", THOUGHT))]
    (tmp_path / "chat.jsonl").write_bytes(jsonl([{"talk": talk, "s": "S"}]))
    info = tmp_path / "dataset_info.json"
    for name in ("plain", "named", "chat"):
        assert list(conversations(data_settings(tmp_path, f"{info}:{name}"))) == [WANTED]
    for name, message in (("hub", "the entry has no file_name; download"), ("plane", "no entry plane; there are pl")):
        with pytest.raises(ValueError, match=message):
            prepare(data_settings(tmp_path, f"{info}:{name}"))
    with pytest.raises(ValueError, match="name the entry as well"):
        prepare(data_settings(tmp_path, info))


@pytest.mark.parametrize("content, message", [
    (b'{"messages": [}\n', "a.jsonl line 2: malformed JSON: .*; each line must be a whole object"),
    (b'{"messages": "\xff"}\n', "a.jsonl line 2: not UTF-8: invalid start byte at byte 14"),
    (b"[1]\n", "a.jsonl line 2: a row must be an object with messages, this is a list"),
    (jsonl([{"messages": [user(), user()]}]), "a.jsonl line 2: message 2 has the role user"),
])
def test_bad_lines(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([OPENAI]) + content + jsonl([OPENAI]))
    with pytest.raises(ValueError, match=message + r".*\(1 bad row so far; --max-bad-rows 0 are skipped\)"):
        prepare(data_settings(tmp_path, path))
    counts = prepare(data_settings(tmp_path, path, max_bad_rows=1)).total
    assert (counts.rows, counts.samples, counts.bad_rows) == (3, 2, 1) and sum(counts.dropped.values()) == 1
    with pytest.raises(ValueError, match=message):  # of the dataset in the cache as well
        prepare(data_settings(tmp_path, path))


@pytest.mark.parametrize("content, message", [
    (b'[{"a": 1},\n{"b": }]', "line 2: malformed JSON"),
    (b'[{"a": 1},\n{"b": 2}', "line 2: the file breaks off before the end"),
    (b'[{"a": "\xff"}]', "not UTF-8")])
def test_broken_lists(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(data_settings(tmp_path, tmp_path / "a.json", max_bad_rows=9))


def test_files_that_are_no_chats(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    silent = {"messages": [user(), assistant(loss=False)]}
    (tmp_path / "silent.jsonl").write_bytes(jsonl([silent, silent]))
    for name, message in (("a.txt", "plain text has no conversations"), ("no.json", "--dataset .*no.json: no such"),
                          ("empty.jsonl", "nothing with loss in the whole set of 0 rows"),
                          ("silent.jsonl", r"nothing with loss in the whole set of 2 rows \(2 nothing with loss\)")):
        with pytest.raises(ValueError, match=message):
            prepare(data_settings(tmp_path, tmp_path / name))


def test_the_example():
    path = Path(__file__).parents[3] / "data" / "train_example.json"
    found = [to_conversation(row) for row in json.loads(path.read_text())]
    assert [turn.weight for turn in found[1].turns if turn.role == "assistant"] == [0, 1]
    assert [each.turns[-1].reasoning is not None for each in found] == [True, True, True, False]
