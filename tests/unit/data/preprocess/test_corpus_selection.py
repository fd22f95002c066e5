"""Duplicates, limits, shuffling and blends against a few lines of Python on lists."""

import json
import random

import numpy as np
import pytest

from corpora import contents, documents_of, run, settings_of, write_lines
from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.preprocess import selection


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1000 documents of 0 to 6 ids, many of them equal, in two files; the titles number them."""
    folder, generator = tmp_path_factory.mktemp("selection"), random.Random(1)
    texts = [" ".join(str(generator.randrange(5)) for _ in range(generator.randrange(7))) for _ in range(1000)]
    documents = [{"text": text, "title": f"{number}"} for number, text in enumerate(texts)]
    write_lines(folder / "a.jsonl", documents[:600])
    write_lines(folder / "b.jsonl.gz", documents[600:])
    return folder, texts


def settings_in(folder, tmp_path, **changes):
    return settings_of(folder, input=(str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")), append_eod=False,
                       output_prefix=str(tmp_path / "out"), **changes)


def texts_of(prefix) -> list[str]:
    """Documents, also those without ids, as text."""
    index = open_index(str(prefix), "")
    sequences = iter(documents_of(prefix)) if index.num_sequences else iter(())
    counts = np.diff(index.map(index.documents))
    return [" ".join(str(token) for _ in range(count) for token in next(sequences)) for count in counts.tolist()]


def test_dedup_keeps_the_first_of_equal_documents(folder, tmp_path):
    folder, texts = folder
    report = run(settings_in(folder, tmp_path, dedup="exact", workers=2, part_bytes=1500))
    expected = list(dict.fromkeys(texts))
    assert texts_of(tmp_path / "out_text_document") == expected
    assert report.skipped == {"duplicate of an earlier document": 1000 - len(expected)} and report.parts > 8


def test_documents_are_equal_only_if_all_their_texts_are(folder, tmp_path):
    folder, texts = folder
    report = run(settings_in(folder, tmp_path, dedup="exact", json_keys=("text", "title"), part_bytes=3000))
    assert report.documents == 1000
    write_lines(tmp_path / "c.jsonl", [{"a": ["1", "2"], "b": "3"}, {"a": ["1"], "b": "23"}, {"a": "12", "b": "3"}])
    report = run(settings_of(tmp_path, "c.jsonl", dedup="exact", json_keys=("a", "b")))
    assert report.documents == 3


@pytest.mark.parametrize("dedup", [None, "exact"])
def test_max_documents_are_the_first_ones(folder, tmp_path, dedup):
    folder, texts = folder
    report = run(settings_in(folder, tmp_path, dedup=dedup, max_documents=150, part_bytes=700))
    assert texts_of(tmp_path / "out_text_document") == (list(dict.fromkeys(texts)) if dedup else texts)[:150]
    assert dedup or report.parts < 10  # not all of the input was read


def test_shuffling(folder, tmp_path, monkeypatch):
    """A permutation that depends on the seed alone, the same for all keys, and as even as one should be."""
    folder, texts = folder
    asked = {"json_keys": ("text", "title"), "shuffle_seed": 5}
    run(settings_in(folder, tmp_path, workers=2, part_bytes=1500, **asked))
    order = [int(title) for title in texts_of(tmp_path / "out_title_document")]
    assert sorted(order) == list(range(1000)) and order != sorted(order)
    assert texts_of(tmp_path / "out_text_document") == [texts[number] for number in order]
    correlation = np.corrcoef(order, range(1000))[0, 1]
    assert abs(correlation) < 0.13  # four standard deviations of a random permutation of 1000

    first = contents(tmp_path)
    monkeypatch.setattr(selection, "ROWS_PER_GROUP", 37)
    run(settings_in(folder, tmp_path, **asked))
    assert contents(tmp_path) == first
    run(settings_in(folder, tmp_path, **asked | {"shuffle_seed": 6}))
    assert contents(tmp_path) != first


def test_all_of_it_together(folder, tmp_path):
    folder, texts = folder
    report = run(settings_in(folder, tmp_path, dedup="exact", max_documents=100, shuffle_seed=1, min_chars=1,
                             world_size=1, part_bytes=2000))
    expected = [text for text in dict.fromkeys(texts) if text][:100]
    found = texts_of(tmp_path / "out_text_document")
    assert sorted(found) == sorted(expected) and found != expected
    assert sum(report.skipped.values()) == 900


def test_a_blend_names_the_pieces(folder, tmp_path):
    folder, texts = folder
    report = run(settings_in(folder, tmp_path, merge=False, part_bytes=20_000))
    lines = [line.split() for line in (tmp_path / "out_text_document.blend").read_text().splitlines()]
    assert [prefix for _, prefix in lines] == [each.prefix for each in report.datasets["text"]]
    assert len(lines) == report.parts > 1
    assert [text for _, prefix in lines for text in texts_of(prefix)] == texts
    assert [int(tokens) for tokens, _ in lines] == [sum(map(len, documents_of(prefix))) for _, prefix in lines]
    assert json.loads((tmp_path / "out_report.json").read_text())["documents"] == 1000
