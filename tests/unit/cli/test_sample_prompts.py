"""Rows of all forms become prompts: what is asked, what is right, and why a row is not asked."""

import json

import pytest
from chat_tokenizers import ALL, write_tokenizer

from megatron_deepseek.cli.sample_prompts import PromptRows, Wording
from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.finetuning.conversation import BadRow
from megatron_deepseek.serving.chat import ChatFormat

USER, SAID = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "<think>t</think>4"}
ASKED = ({"role": "user", "content": "2 + 2?"},)
R1 = "<｜begin▁of▁sentence｜><｜User｜>2 + 2?<｜Assistant｜><think>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("prompts"), ALL)


@pytest.fixture(scope="module")
def rows(folder):
    def reader(most: int = 200, **wording) -> PromptRows:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
        return PromptRows(Wording(**wording), tokenizer,
                          lambda: ChatFormat.of(tokenizer, folder, "deepseek-r1", True), most)
    return reader


@pytest.mark.parametrize("row, answer", [
    ({"messages": [USER]}, None), ({"messages": [USER, SAID]}, "4"), ({"messages": [USER, SAID], "answer": "5"}, "5"),
    ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, "4"),
    ({"prompt": "2 + 2?", "solution": "4"}, None), ({"prompt": [USER]}, None), ({"question": "2 + 2?"}, None),
    ({"problem": "2 + 2?", "answer": 4}, 4), ({"query": "2 + 2?", "response": "4"}, None)])
def test_forms(rows, row, answer):
    prompt = rows().prompt(7, row)
    assert (prompt.number, prompt.messages, prompt.row.get("answer")) == (7, ASKED, answer)
    assert prompt.text == R1 and prompt.asked == "2 + 2?"


def test_a_question_and_its_input(rows):
    assert rows().prompt(1, {"instruction": "Add.", "input": "2 2"}).asked == "Add.\n2 2"


def test_columns_system_and_what_is_appended(rows):
    reader = rows(question="q", answer="a", system="Be brief.", append=" Think.")
    prompt = reader.prompt(1, {"q": "2 + 2?", "a": 4, "prompt": "another"})
    assert prompt.row["answer"] == "4" and prompt.messages == (
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2? Think."})
    own = reader.prompt(1, {"q": "2 + 2?", "a": 4, "system": "Be long."})
    assert own.messages[0]["content"] == "Be long." and "Be long.<｜User｜>2 + 2? Think." in own.text


def test_earlier_answers_are_not_trained_on_again(rows):
    said = {"role": "assistant", "content": "4", "reasoning_content": "t"}
    messages = [USER, said, {"role": "user", "content": "And 3 + 3?"}]
    assert rows().prompt(1, {"messages": messages}).messages[1] == {**said, "loss": False}


def test_raw_prompts_have_no_template(rows):
    prompt = rows(raw=True).prompt(1, {"prompt": "2 + 2 ="})
    assert prompt.text == "2 + 2 =" and prompt.question is None
    with pytest.raises(BadRow, match="--raw continues one text"):
        rows(raw=True).prompt(1, {"messages": [{"role": "system", "content": "s"}, USER]})


@pytest.mark.parametrize("row, reason", [
    ([], "not an object"), ({"text": "a"}, "missing field"), ({"prompt": 5}, "wrong type"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no question at the end"),
    ({"messages": [SAID]}, "no question at the end"),
    ({"messages": [{"role": "pope", "content": "q"}]}, "unknown role"),
    ({"query": "q", "history": [["a", "b"]]}, "history"),
    ({"prompt": "word " * 300}, "longer than --seq-length allows")])
def test_why_a_row_is_not_asked(rows, row, reason):
    with pytest.raises(BadRow) as error:
        rows().prompt(1, row)
    assert error.value.reason == reason


def test_files_are_read_and_bad_rows_counted(rows, tmp_path):
    good, bad = json.dumps({"messages": [USER]}), json.dumps({"x": 1})
    (tmp_path / "one.jsonl").write_text(f"{good}\nno JSON\n\n{bad}\n")
    (tmp_path / "two.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}]))
    reader = rows()
    prompts = reader.read([str(tmp_path / "one.jsonl"), str(tmp_path / "two.json")])
    assert [each.number for each in prompts] == [1, 4, 5]
    assert reader.unusable == {"malformed JSON": 1, "missing field": 1}
    assert reader.first_bad["missing field"].startswith(f"{tmp_path}/one.jsonl line 4: the row has none of the columns")
    with pytest.raises(ValueError, match="no prompt that can be asked: .* line 1: the row has none of the columns q"):
        rows(question="q").read([str(tmp_path / "two.json")])


def test_parquet(rows, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    table = pyarrow.table({"problem": ["2 + 2?", "3 + 3?"], "answer": ["4", "6"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    found = rows().read([str(tmp_path / "p.parquet")])
    assert [(each.number, each.asked, each.row["answer"]) for each in found] == [(1, "2 + 2?", "4"), (2, "3 + 3?", "6")]
