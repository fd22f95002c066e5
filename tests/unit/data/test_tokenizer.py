"""Tokenizers and the tools that make a corpus and a tokenizer, against the tokenizers library used directly."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from megatron_deepseek.data.tokenizer import SPECIAL_TOKENS, build_tokenizer
from megatron_deepseek.inference.text import prompt_ids

ROOT = Path(__file__).resolve().parents[3]
TEXT = "def square(number):\n    return number ** 2  # 1234567 — Größe 漢字 🙂\r\n\r\n\tThe end."


def run_tool(name, *arguments, threads="2"):
    return subprocess.run([sys.executable, ROOT / "tools" / name, *map(str, arguments)], capture_output=True, text=True,
                          env={"PATH": "", "RAYON_NUM_THREADS": threads})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with tokenizer.json, what the tool printed): 400 entries from a small slice of the corpus."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = run_tool("make_corpus.py", "--output", folder / "corpus.jsonl", "--max-bytes", 200_000)
    assert corpus.returncode == 0, corpus.stderr
    done = run_tool("train_tokenizer.py", "--input", folder / "corpus.jsonl", "--output", folder / "tokenizer.json",
                    "--vocab-size", 400)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def write_tokenizer(folder, special=("<｜end▁of▁sentence｜>",), config=None):
    """A word-level tokenizer.json with the given special tokens after the words a, b, c."""
    words = {word: index for index, word in enumerate(("a", "b", "c"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


def test_corpus_is_the_same_twice_and_has_each_document_once(tmp_path):
    for name in ("one", "two"):
        run_tool("make_corpus.py", "--output", tmp_path / name, "--max-bytes", 300_000)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    documents = [json.loads(line) for line in (tmp_path / "one").read_text().splitlines()]
    assert 200_000 < sum(len(document["text"].encode()) for document in documents) <= 300_000
    sources = [document["source"] for document in documents]
    assert sources == sorted(set(sources), key=lambda source: hashlib.sha256(source.encode()).digest())
    assert {source.split("/")[0] for source in sources} == {"manual", "lib"}


def test_training_gives_the_asked_size_and_the_same_file_on_any_threads(trained, tmp_path):
    folder, printed = trained
    assert " 400 entries from " in printed
    run_tool("train_tokenizer.py", "--input", folder / "corpus.jsonl", "--output", tmp_path / "again.json",
             "--vocab-size", 400, threads="1")
    assert (tmp_path / "again.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_training_splits_as_deepseek_v3(trained):
    backend = tokenizers.Tokenizer.from_file(str(trained[0] / "tokenizer.json"))
    pieces = [TEXT[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert pieces[:12] == ["def", " square", "(number", "):\n", "   ", " return", " number", " **", " ", "2", " ", " #"]
    assert pieces[12:] == [" ", "123", "456", "7", " —", " Größe", " ", "漢字", " 🙂\r\n\r\n", "\tThe", " end", "."]


def test_ids_are_those_of_the_library_and_decode_gives_the_text(trained):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(trained[0]))
    backend = tokenizers.Tokenizer.from_file(str(trained[0] / "tokenizer.json"))
    text = TEXT + SPECIAL_TOKENS[2]
    assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_batch([text, "", "x"]) == [tokenizer.encode(text), [], tokenizer.encode("x")]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.encode(text)[-1]) == (400, 0, 1, 2)


def test_truncation_and_added_tokens_of_the_file_are_off(tmp_path):
    backend = write_tokenizer(tmp_path)
    backend.enable_truncation(2)
    backend.post_processor = tokenizers.processors.TemplateProcessing("<｜end▁of▁sentence｜> $A", special_tokens=[
        ("<｜end▁of▁sentence｜>", 3)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path)).encode_batch(["a b c a b"]) == [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize("special, config, eod, bos", [
    (["<s>", "</s>"], None, 4, 3),
    (["<|endoftext|>"], {}, 3, None),
    (["</s>", "<x>"], {"eos_token": "<x>"}, 4, None),
    (["<s>", "<x>"], {"eos_token": {"content": "<x>"}, "bos_token": None}, 4, 3),
    (["</s>", "<｜end▁of▁sentence｜>"], None, 4, None),
])
def test_end_of_document_is_found(tmp_path, special, config, eod, bos):
    write_tokenizer(tmp_path, special, config)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))
    assert (tokenizer.eod, tokenizer.bos, tokenizer.vocab_size) == (eod, bos, 3 + len(special))


@pytest.mark.parametrize("special, config, expected", [
    (("<s>", "</s>"), None, False), (("<s>", "</s>"), {"add_bos_token": True}, True),
    (("<s>", "</s>"), {"add_bos_token": False}, False), (("</s>",), {"add_bos_token": True}, False)])
def test_whether_a_prompt_begins_with_a_token(tmp_path, special, config, expected):
    """As tokenizer_config.json says, where there is such a token; texts are encoded without in any case."""
    write_tokenizer(tmp_path, special, config)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert tokenizer.adds_bos is expected
    ids = [1, 2]
    assert tokenizer.encode("b c") == ids
    assert prompt_ids(tokenizer, "b c") == ([tokenizer.bos] if expected else []) + ids
    assert prompt_ids(tokenizer, "") == [tokenizer.bos if expected else tokenizer.eod]


def test_a_tokenizer_json_that_adds_the_token_itself(tmp_path):
    backend = write_tokenizer(tmp_path, ("<s>", "</s>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert tokenizer.adds_bos and tokenizer.encode("b") == [1] and prompt_ids(tokenizer, "<s> b") == [3, 1]


def test_byte_tokenizer():
    tokenizer = build_tokenizer("ByteTokenizer")
    assert tokenizer.encode("aé<｜User｜>")[:4] == [97, 0xC3, 0xA9, ord("<")]
    assert (tokenizer.bos, tokenizer.eod, tokenizer.vocab_size) == (256, 257, 260)
    assert tokenizer.decode(tokenizer.encode(TEXT) + [257, 300]) == TEXT + "<｜end▁of▁sentence｜>"


def test_null_tokenizer_counts_its_end_of_document():
    tokenizer = build_tokenizer("NullTokenizer", "100")
    assert (tokenizer.encode("17 4\n99"), tokenizer.eod, tokenizer.vocab_size) == ([17, 4, 99], 100, 101)
    with pytest.raises(ValueError, match=r"ids from 4 to 101, not in \[0, 101\)"):
        tokenizer.encode("4 101")


@pytest.mark.parametrize("kind, model, message", [
    ("GPT2", None, "--tokenizer-type GPT2 is not one of"),
    ("HuggingFaceTokenizer", None, "--tokenizer-model is missing"),
    ("HuggingFaceTokenizer", "nowhere", "--tokenizer-model nowhere: there is no file nowhere"),
    ("HuggingFaceTokenizer", __file__, "is not a readable tokenizer.json"),
    ("NullTokenizer", "many", "--tokenizer-model many: NullTokenizer needs"),
])
def test_refusals(kind, model, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(kind, model)


def test_refused_without_end_of_document_or_with_an_unknown_one(tmp_path):
    write_tokenizer(tmp_path, ["<x>"])
    with pytest.raises(ValueError, match="has no end-of-document token"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    write_tokenizer(tmp_path, ["<x>"], {"eos_token": "<y>"})
    with pytest.raises(ValueError, match="eos_token '<y>' is not in the vocabulary"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))


def test_the_tools_refuse_in_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    output = tmp_path / "tokenizer.json"
    for arguments, message in (
            (["--input", tmp_path / "bad.jsonl"], "bad.jsonl line 2: malformed JSON"),
            (["--input", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
            (["--input", tmp_path / "bad.jsonl", "--vocab-size", 100], "--vocab-size 100: 260 are needed")):
        done = run_tool("train_tokenizer.py", "--output", output, *arguments)
        assert (done.returncode, message in done.stderr.splitlines()[-1], output.exists()) == (2, True, False)
