"""The tokenizer of a GGUF file: llama.cpp's name of how texts are cut, and which entries are what."""

import json
from pathlib import Path

import pytest
from chat_tokenizers import write_distilled, write_tokenizer
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatron_deepseek.checkpoint.convert.tokenizer_files import replace_tokenizer, tokenizer_to_keep
from megatron_deepseek.checkpoint.gguf.vocabulary import read_vocabulary
from megatron_deepseek.cli.train_tokenizer import save, train
from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, EOD, SPECIAL_TOKENS, USER

TEXTS = ["a few words, 12345 of them; and (some) more.\n\n    indented 北京", "the few words again"]


def trained(folder: Path, isolate_punctuation: bool = False) -> Path:
    save(train(TEXTS * 9, 300, isolate_punctuation), folder / "tokenizer.json")
    return folder


def bytes_only(folder: Path) -> Path:
    folder.mkdir()
    replace_tokenizer(folder, tokenizer_to_keep("ByteTokenizer", None)[0])
    return folder


@pytest.mark.parametrize("make, name", [
    (trained, "deepseek-v3"), (bytes_only, "gpt-2"), (write_tokenizer, "gpt-2"),
    (lambda folder: write_distilled(folder, "qwen", None), "qwen2"),
    (lambda folder: write_distilled(folder, "llama", None), "llama-bpe")])
def test_how_texts_are_cut_is_known_by_its_expressions(tmp_path, make, name):
    assert read_vocabulary(Path(make(tmp_path / "it")), None, None).pre_tokenizer == name


def test_another_way_to_cut_texts_needs_a_name(tmp_path):
    folder = trained(tmp_path / "it", isolate_punctuation=True)
    with pytest.raises(ValueError, match="llama.cpp has no known name.*--gguf-pre-tokenizer NAME"):
        read_vocabulary(folder, None, None)
    assert read_vocabulary(folder, "deepseek-v3", None).pre_tokenizer == "deepseek-v3"


@pytest.mark.parametrize("steps", [
    [pre_tokenizers.ByteLevel(add_prefix_space=True)],
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)],
    [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]])
def test_steps_beside_the_known_ones_are_another_way(tmp_path, steps):
    folder = Path(write_tokenizer(tmp_path / "it"))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="llama.cpp has no known name"):
        read_vocabulary(folder, None, None)


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"w0": 0, EOD: 1}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no byte-level BPE"):
        read_vocabulary(tmp_path, None, None)


def test_entries_and_merges_are_those_of_the_file(tmp_path):
    """What a chat writes is control, whether or not the file calls it special; <think> is a text of the user's."""
    folder = Path(write_tokenizer(tmp_path / "it"))
    fields = json.loads((folder / "tokenizer.json").read_text())
    found = read_vocabulary(folder, None, None)
    for text, identity in fields["model"]["vocab"].items():
        assert (found.tokens[identity], found.types[identity]) == (text, TokenType.NORMAL)
    assert [merge.split(" ") for merge in found.merges] == fields["model"]["merges"] and len(found.merges) > 50
    kinds = {found.tokens[each["id"]]: found.types[each["id"]] for each in fields["added_tokens"]}
    assert [kinds[token] for token in (BOS, EOD, USER, ASSISTANT, "<think>")] == [
        *[TokenType.CONTROL] * 4, TokenType.USER_DEFINED]
    assert (found.tokens[found.bos], found.tokens[found.eos], found.pad) == (BOS, EOD, found.eos)


def test_bytes_have_a_merge_that_is_never_made(tmp_path):
    """llama.cpp refuses a tokenizer without merges."""
    found = read_vocabulary(bytes_only(tmp_path / "it"), None, None)
    assert len(found.tokens) == 256 + len(SPECIAL_TOKENS) and found.merges == ("一 一",)
    assert "一" not in "".join(found.tokens)


def test_begin_and_template(tmp_path):
    """As tokenizer_config.json says; a template that was asked for goes first."""
    folder = Path(write_distilled(tmp_path / "it", "qwen", "THEIRS"))
    found = read_vocabulary(folder, None, None)
    assert (found.adds_bos, found.chat_template) == (True, "THEIRS")
    assert read_vocabulary(folder, None, "OURS").chat_template == "OURS"
    (folder / "chat_template.jinja").write_text("FILE")
    assert read_vocabulary(folder, None, None).chat_template == "FILE"
    assert not read_vocabulary(trained(tmp_path / "other"), None, None).adds_bos


def test_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json.*--assets DIR brings one"):
        read_vocabulary(tmp_path, None, None)
