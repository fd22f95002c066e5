"""The perplexity of files, with a model that gives every token the same probability: exp(1/8) for each token."""

import json
import math

import pytest
from evaluated_models import ArithmeticModel
from small_datasets import EOD, write_dataset

from megatron_deepseek.data.tokenizer import NullTokenizer
from megatron_deepseek.evaluation.perplexity import perplexity_of
from megatron_deepseek.evaluation.questions import Continuation

TEXTS = ["two words", "", "a longer one: 北京 and more of it"]


def write(path, form: str):
    """Write the texts; return the file, and how many bytes and words it has."""
    if form == "jsonl":
        path = path / "texts.jsonl"
        path.write_text("\n".join(json.dumps({"content": text, "text": 1}) for text in TEXTS) + "\n")
        return path, sum(len(text.encode()) for text in TEXTS), 2 + 8
    path = path / "text.txt"
    path.write_text("\n".join(TEXTS))
    return path, len("\n".join(TEXTS).encode()), 2 + 8


@pytest.mark.parametrize("form", ["jsonl", "txt"])
@pytest.mark.parametrize("stride", [None, 3])
def test_means_are_over_tokens_bytes_and_words(tmp_path, form, stride):
    path, num_bytes, words = write(tmp_path, form)
    model, told = ArithmeticModel(), []
    found = perplexity_of(model, path, stride, "content", told.append)
    assert (found.tokens, found.bytes, found.words, found.documents) == (num_bytes, num_bytes, words,
                                                                         3 if form == "jsonl" else 1)
    record = found.record()
    assert record["token_perplexity"] == record["byte_perplexity"] == pytest.approx(math.exp(1 / 8))
    assert record["word_perplexity"] == pytest.approx(math.exp(num_bytes / 8 / words))
    assert record["bits_per_byte"] == pytest.approx(1 / 8 / math.log(2)) and record["loss"] == pytest.approx(1 / 8)
    assert sum(told) == num_bytes and sum(len(each.text) for each in model.asked) == num_bytes
    assert len(model.asked[0].tokens) <= 17 and model.tokenizer.bos in {each.context[0] for each in model.asked}


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_an_indexed_dataset_is_read_by_documents(tmp_path, ending):
    """Its ids are taken as they are, the end of each document with them; words are those of the decoded text."""
    documents = write_dataset(tmp_path / "data", num_documents=5)
    model = ArithmeticModel(max_length=100, tokenizer=NullTokenizer(EOD))
    found = perplexity_of(model, tmp_path / f"data{ending}")
    assert found.tokens == sum(map(len, documents)) and found.words == found.tokens - 5
    assert sorted(model.asked, key=lambda each: each.text) == [
        Continuation((EOD,), tuple(document.tolist())) for document in documents]


def test_the_token_that_begins_a_document_is_not_predicted(tmp_path):
    """Where its ids begin with it, as with --append-bos."""
    model = ArithmeticModel()
    model.tokenizer.bos = ord("t")
    (tmp_path / "text.txt").write_text("text")
    assert perplexity_of(model, tmp_path / "text.txt").tokens == 3
    assert model.asked == [Continuation((ord("t"),), tuple(b"ext"))]


@pytest.mark.parametrize("content, name, message", [
    (b"", "text.txt", "has no text"), (b'{"text": 3}', "a.jsonl", "line 1: \"text\" is 3, not a text"),
    (b'{"other": ""}', "a.jsonl", "line 1 has no \"text\""), (b"\xff\xfe", "text.txt", "is not UTF-8: byte 0")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        perplexity_of(ArithmeticModel(), tmp_path / name)


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    write_dataset(tmp_path / "data", num_documents=20)
    with pytest.raises(ValueError, match="has the id 999, and the tokenizer has ids below 260"):
        perplexity_of(ArithmeticModel(), tmp_path / "data")
