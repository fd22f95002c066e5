"""Chat templates: the strings that DeepSeek's models are asked with, by hand from their reports and released files."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_deepseek.checkpoint.convert.chat_templates import read_template, template_names
from megatron_deepseek.checkpoint.convert.tokenizer_files import check_template, tokenizer_in, write_template
from megatron_deepseek.data.tokenizer import build_tokenizer

B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "<think>\nR1\n</think>\n\nA1"}, {"role": "user", "content": "Q2"}]
PLAIN = [*TALK[:2], {"role": "assistant", "content": "A1"}, TALK[3]]


def tokenizer_of(directory: Path, tokens=(B, E, U, A, "<think>", "</think>")) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"S": 0, "Q1": 1, "A1": 2}, unk_token="S"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(tokens))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=B, eos_token=E)
    tokenizer.save_pretrained(directory)
    return tokenizer


@pytest.mark.parametrize("name, messages, options, expected", [
    ("deepseek-v3", PLAIN, {}, f"{B}S{U}Q1{A}A1{E}{U}Q2{A}"),
    ("deepseek-v3", PLAIN[1:], {}, f"{B}{U}Q1{A}A1{E}{U}Q2{A}"),
    ("deepseek-v3", [TALK[0], *PLAIN, TALK[0]], {}, f"{B}S\n\nS\n\nS{U}Q1{A}A1{E}{U}Q2{A}"),
    ("deepseek-v3", PLAIN[:3], {"add_generation_prompt": False}, f"{B}S{U}Q1{A}A1{E}"),
    ("deepseek-v3", TALK, {}, f"{B}S{U}Q1{A}<think>\nR1\n</think>\n\nA1{E}{U}Q2{A}"),
    ("deepseek-r1", TALK, {}, f"{B}S{U}Q1{A}\n\nA1{E}{U}Q2{A}<think>\n"),
    ("deepseek-r1", PLAIN, {}, f"{B}S{U}Q1{A}A1{E}{U}Q2{A}<think>\n"),
    ("deepseek-v3.1", PLAIN, {}, f"{B}S{U}Q1{A}</think>A1{E}{U}Q2{A}</think>"),
    ("deepseek-v3.1", PLAIN, {"thinking": True}, f"{B}S{U}Q1{A}</think>A1{E}{U}Q2{A}<think>"),
    ("deepseek-v3.1", TALK, {}, f"{B}S{U}Q1{A}</think>\n\nA1{E}{U}Q2{A}</think>"),
])
def test_strings(tmp_path, name, messages, options, expected):
    tokenizer_of(tmp_path)
    write_template(tmp_path, check_template(name, tokenizer_in(tmp_path), tmp_path))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    options = {"add_generation_prompt": True} | options
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == expected


@pytest.mark.parametrize("name", template_names())
def test_what_a_template_has_no_form_for_is_refused(tmp_path, name):
    tokenizer_of(tmp_path)
    write_template(tmp_path, read_template(name))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for messages, more in (([*PLAIN, {"role": "tool", "content": "x"}], {}), (PLAIN, {"tools": [tool]})):
        with pytest.raises(Exception, match="this template has no form for"):
            tokenizer.apply_chat_template(messages, tokenize=False, **more)


def test_a_template_needs_its_tokens(tmp_path):
    for tokenizer in (tokenizer_in(tmp_path), build_tokenizer("NullTokenizer", "9")):
        with pytest.raises(ValueError, match="--chat-template deepseek-v3 needs a tokenizer of texts, which x has not"):
            check_template("deepseek-v3", tokenizer, "x")
    tokenizer_of(tmp_path, (B, E, U, A))
    for tokenizer in (tokenizer_in(tmp_path), build_tokenizer("ByteTokenizer")):
        assert check_template("deepseek-v3", tokenizer, "x") == read_template("deepseek-v3")
        with pytest.raises(ValueError, match="--chat-template deepseek-r1 writes <think>, which is no token of x"):
            check_template("deepseek-r1", tokenizer, "x")
        with pytest.raises(ValueError, match="neither one of deepseek-v3, deepseek-r1, deepseek-v3.1 nor a readable"):
            check_template("deepseek-v9", tokenizer, "x")


def test_there_is_one_template_in_the_end(tmp_path):
    """A file of the user's, in place of the one that tokenizer_config.json has."""
    tokenizer_of(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "old"}))
    own = tmp_path / "own.txt"
    own.write_text("{{ messages[0]['content'] }}!")
    write_template(tmp_path, check_template(str(own), tokenizer_in(tmp_path), tmp_path))
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "S!"
