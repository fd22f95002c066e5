"""Which library tokenises, and long texts in pieces: the ids are always those of `tokenizers` on the whole text."""

import importlib.util
import json
import random
import re
import sys

import numpy as np
import pytest

from corpora import contents, documents_of, run, settings_of
from megatron_deepseek.data.preprocess import cutting, encoders, long_text, part, records, texts
from megatron_deepseek.data.preprocess.fim import Rearrangement, draw_rearrangement
from megatron_deepseek.data.preprocess.long_text import BadDocument
from megatron_deepseek.data.preprocess.settings import Content
from megatron_deepseek.data.text_splits import DEEPSEEK_V3
from megatron_deepseek.data.tokenizer import FIM_TOKENS, SPECIAL_TOKENS, HuggingFaceTokenizer

WORDS = ("the of and to in Sprache über naïve 12345 don't x=y+1; \n\n  \t ﬁ 中文字符，测试。日本語の、テスト！ "
         "한국어 👩‍👧 é return lambda: None // ===== <b>").split(" ")


def text_of(generator, words: int) -> str:
    return "".join(generator.choice(WORDS) + generator.choice((" ", " ", " ", "\n", "")) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """Byte-level BPE with DeepSeek-V3's pre-tokenization and fill-in-the-middle tokens, 700 entries."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in DEEPSEEK_V3]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL_TOKENS, *FIM_TOKENS[0]],
                                  show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    generator = random.Random(0)
    tokenizer.train_from_iterator((text_of(generator, 100) for _ in range(50)), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def corpus(tmp_path, sizes=(3, 300, 50, 0, 700), ascii_json=True):
    generator = random.Random(2)
    texts = [text_of(generator, size) for size in sizes]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=ascii_json) + "\n" for text in texts), encoding="utf-8")
    return texts


def settings_with(tmp_path, tokenizer_json, **changes):
    return settings_of(tmp_path, **{"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer_json),
                                    "append_eod": False} | changes)


def expected_ids(tokenizer_json, texts):
    tokenizer = HuggingFaceTokenizer(tokenizer_json)
    return [ids for ids in tokenizer.encode_batch(texts) if ids]


@pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")
def test_gigatoken_is_taken_where_its_ids_agree(tmp_path, tokenizer_json):
    documents = corpus(tmp_path)
    report = run(settings_with(tmp_path, tokenizer_json))
    assert report.tokenizer_backend == "gigatoken"
    assert documents_of(tmp_path / "out_text_document") == expected_ids(tokenizer_json, documents)


class WrongEncoder(encoders.GigatokenEncoder):
    """As gigatoken might be: right about all but one kind of text."""

    def __init__(self, path, cache_bytes):
        self.backend, self._tokenizer = "gigatoken", HuggingFaceTokenizer(path)

    def encode_batch(self, texts):
        return [np.array(self._tokenizer.encode(text.replace("über", "ueber"))) for text in texts]


def test_tokenizers_is_taken_where_they_differ(tmp_path, tokenizer_json, monkeypatch):
    from megatron_deepseek.data.preprocess.run import preprocess
    monkeypatch.setattr(encoders, "GigatokenEncoder", WrongEncoder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    documents, said = corpus(tmp_path), []
    report = preprocess(settings_with(tmp_path, tokenizer_json), said.append)
    assert report.tokenizer_backend == "tokenizers" and len(said) == 1
    assert "--tokenizer-backend auto: tokenizers, which is slower, because gigatoken's ids differ" in said[0]
    assert documents_of(tmp_path / "out_text_document") == expected_ids(tokenizer_json, documents)


def test_without_gigatoken(tmp_path, tokenizer_json, monkeypatch):
    from megatron_deepseek.data.preprocess.run import preprocess
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    corpus(tmp_path)
    said = []
    preprocess(settings_with(tmp_path, tokenizer_json), said.append)
    assert said == ["--tokenizer-backend auto: tokenizers, which is slower, because gigatoken is not installed: "
                    f"{sys.executable} -m pip install 'gigatoken>=0.10'"]
    with pytest.raises(ValueError, match="--tokenizer-backend gigatoken: gigatoken is not installed"):
        run(settings_with(tmp_path, tokenizer_json, tokenizer_backend="gigatoken"))


@pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")
def test_gigatokens_cache_is_bounded(tokenizer_json, monkeypatch):
    encoder = encoders.GigatokenEncoder(tokenizer_json, 1 << 30)
    loaded, returned = encoder.encode_batch(["a b"]), []
    monkeypatch.setattr(encoders, "return_freed_memory", lambda: returned.append("memory"))
    assert np.array_equal(encoder.encode_batch(["a b"])[0], loaded[0]) and not returned
    monkeypatch.setattr(encoders, "resident_bytes", lambda: 1 << 40)
    assert np.array_equal(encoder.encode_batch(["a b"])[0], loaded[0]) and returned == ["memory"]


@pytest.fixture
def small_pieces(monkeypatch):
    """Everything that is done for texts of megabytes is done for those of a few hundred characters."""
    for module, name, value in ((cutting, "PIECE_CHARS", 500), (cutting, "CONTEXT_CHARS", 60),
                                (cutting, "MOST_UNCUT_CHARS", 2000), (part, "PIECE_CHARS", 500),
                                (texts, "PIECE_CHARS", 500), (records, "LONG_LINE_BYTES", 600),
                                (long_text, "LONG_LINE_BYTES", 600), (long_text, "LONG_STRING_BYTES", 100),
                                (long_text, "PIECE_BYTES", 97)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(cutting.slices, "__defaults__", (500,))


@pytest.mark.parametrize("backend", ["auto", "tokenizers"])
@pytest.mark.parametrize("ascii_json", [True, False])
def test_long_documents_have_the_ids_of_whole_ones(tmp_path, tokenizer_json, small_pieces, backend, ascii_json):
    documents = corpus(tmp_path, (3, 2000, 50, 0, 700, 5000), ascii_json)
    run(settings_with(tmp_path, tokenizer_json, tokenizer_backend=backend))
    assert documents_of(tmp_path / "out_text_document") == expected_ids(tokenizer_json, documents)


def test_long_documents_pass_the_same_filters(tmp_path, tokenizer_json, small_pieces):
    documents = corpus(tmp_path, (2000, 300, 5000, 2000))
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, lines[0], lines[2][:-3], json.dumps({"text": "Ω" * 3000}),
                                                    json.dumps({"text": documents[0] + "Ω" * 3000}),
                                                    json.dumps({"text": "in the end"})]))
    report = run(settings_with(tmp_path, tokenizer_json, dedup="exact", append_bos=True, append_eod=True,
                               max_chars=len(documents[2]) - 1))
    found = documents_of(tmp_path / "out_text_document")
    kept = [documents[0], documents[1], documents[3], "in the end"]
    assert found == [[0, *ids, 1] for ids in expected_ids(tokenizer_json, kept)]
    assert report.skipped == {f"longer than --max-chars {len(documents[2]) - 1}": 1, "malformed JSON": 1,
                              "duplicate of an earlier document": 1, "cannot be cut": 2}


def test_a_place_to_cut_is_one_where_the_ids_do_not_change(tokenizer_json):
    encoder = encoders.TokenizerEncoder(HuggingFaceTokenizer(tokenizer_json), "tokenizers")
    text = text_of(random.Random(3), 3000)
    whole, places, near = encoder.encode_batch([text])[0], 0, 300
    while near < len(text):
        place = cutting.find_cut(encoder, text, near)
        left, right = encoder.encode_batch([text[:place], text[place:]])
        assert np.array_equal(whole, np.concatenate([left, right]))
        places, near = places + 1, near + 300
    assert places > 30
    with pytest.raises(BadDocument, match="without a place"):
        list(cutting.encode_pieces(encoder, ["Ω" * (1 << 20)] * 5))


class JoiningEncoder:
    """A tokenizer that no rule of thumb knows: it has tokens across the blanks between words, none across lines."""

    def encode_batch(self, texts):
        return [np.array([len(token) for token in re.findall(r"\w \w|.|\n", text)], int) for text in texts]


def test_a_likely_place_that_changes_the_ids_is_not_taken():
    text = ("words and words and words\n" + "more words " * 20 + "\n") * 9
    for near in range(300, len(text), 300):
        place = cutting.find_cut(JoiningEncoder(), text, near)
        assert text[place - 1] == "\n"
    assert cutting.find_cut(JoiningEncoder(), "more words " * 90, 900) is None


def test_fim_by_hand():
    fim, pieces = (90, 91, 92), [np.array([1, 2]), np.array([3]), np.array([4, 5])]
    assert Rearrangement(False, 0, 0).join(pieces, fim).tolist() == [90, 1, 2, 91, 4, 5, 92, 3]
    assert Rearrangement(True, 0, 0).join(pieces, fim).tolist() == [90, 91, 4, 5, 92, 1, 2, 3]
    assert Rearrangement(False, 12, 5).cut("abc") == ["", "a", "bc"]  # 12 and 5 modulo 4: 0 and 1
    assert Rearrangement(False, 14, 5).cut("abc") == ["a", "b", "c"]


def test_fim_rates():
    """Of 4000 documents: within four standard deviations."""
    drawn = [draw_rearrangement(1, 0.1, 0.5, 0, place) for place in range(0, 40000, 10)]
    chosen = [each for each in drawn if each]
    assert abs(len(chosen) - 400) < 4 * 19 and abs(sum(each.spm for each in chosen) / len(chosen) - 0.5) < 0.1
    assert not any(draw_rearrangement(1, 0, 0, 0, place) for place in range(100))


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_fim_documents_give_their_text_back(tmp_path, tokenizer_json, spm_rate):
    documents = corpus(tmp_path, (40,) * 60)
    asked = {"fim_rate": 0.5, "fim_spm_rate": spm_rate, "append_eod": True}
    run(settings_with(tmp_path, tokenizer_json, **asked))
    run(settings_with(tmp_path, tokenizer_json, output_prefix=str(tmp_path / "w"), part_bytes=700, workers=2, **asked))
    assert contents(tmp_path) == contents(tmp_path, "w_text_document")
    tokenizer = HuggingFaceTokenizer(tokenizer_json)
    changed = 0
    for text, ids in zip(documents, documents_of(tmp_path / "out_text_document"), strict=True):
        assert ids[-1] == tokenizer.eod
        restored, rearranged = restore(tokenizer, ids[:-1], spm_rate == 1)
        changed += rearranged
        assert restored == text
    assert 15 < changed < 45


def restore(tokenizer, ids, spm) -> tuple[str, bool]:
    begin, hole, end = tokenizer.fim
    if begin not in ids:
        return tokenizer.decode(ids), False
    assert ids[0] == begin and ids.count(hole) == ids.count(end) == 1
    prefix, suffix, middle = ids[1:ids.index(hole)], ids[ids.index(hole) + 1:ids.index(end)], ids[ids.index(end) + 1:]
    as_bytes = [tokenizer.backend.decode(each) for each in (prefix, suffix, middle)]
    prefix, suffix, middle = as_bytes
    assert not spm or prefix == ""
    return (middle + suffix if spm else prefix + middle + suffix), True


def test_fim_is_refused_with_sentences():
    with pytest.raises(ValueError, match="--fim-rate 0.1 and --split-sentences cannot be combined"):
        Content(fim_rate=0.1, split_sentences=True)
