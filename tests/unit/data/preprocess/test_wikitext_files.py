"""WikiText's files: articles and sections as documents, words joined, ids cut into rows; by hand-worked cases."""

import numpy as np
import pytest

from corpora import documents_of, run, settings_of
from megatron_deepseek.cli.preprocess_data import build_parser, settings_from
from megatron_deepseek.data.preprocess import wikitext
from megatron_deepseek.data.preprocess.wikitext import joined

def lines(*texts: str) -> str:
    return "".join(f" {text} \n" if text else " \n" for text in texts)


FIRST = lines("= Tower =", "", "The tower , built in 1 @,@ 840 .", "It stands .", "= 5 =", "", "= = Use = =", "",
              "A ( small ) museum 's .")
SECOND = lines("= Ships of 1840 =", "", "Two .")
FILE = lines("") + FIRST + lines("", "") + SECOND


def texts(tmp_path, content: str | bytes, **changes) -> list[str]:
    (tmp_path / "wiki.train.tokens").write_bytes(content if isinstance(content, bytes) else content.encode())
    changes = {"tokenizer_type": "ByteTokenizer", "append_eod": False} | changes
    run(settings_of(tmp_path, "wiki.train.tokens", **changes))
    return [bytes(ids).decode() for ids in documents_of(tmp_path / "out_text_document")]


def test_an_article_begins_at_its_title_and_is_kept_as_it_is(tmp_path):
    """`= = Use = =` begins no article, nor does `= 5 =`, which is a line of a paragraph: no blank line is before it."""
    assert texts(tmp_path, FILE) == [FIRST, SECOND]
    assert texts(tmp_path, "before \n" + FILE)[0] == "before \n"


def test_a_section_is_prose_without_headings(tmp_path):
    """As MindFormers' wikitext_to_bin has it: what stands between headings, joined."""
    found = texts(tmp_path, FILE, input_format="wikitext", text_unit="section")
    assert found == ["The tower, built in 1,840.\nIt stands.\n= 5 =", "A (small) museum's.", "Two."]


@pytest.mark.parametrize("written, prose", [
    ("role @-@ playing , 2 @.@ 5 ; so : yes ! No ? ", "role-playing, 2.5; so: yes! No? "),
    (' a " quoted " and [ c ] { d } ', 'a "quoted" and [c] {d} '), (" the dogs ' tails ", "the dogs' tails "),
    (" it 's ' so ", "it's' so "),
    (" 20 ° N 30 ' E ", "20°N 30 ' E "), ("<unk> of N ships \n = = b ", "<unk> of 1 ships\n== b "),
])
def test_words_are_joined_to_their_punctuation(written, prose):
    """Two apostrophes are a pair of quotation marks to MindFormers' rules, whatever they are."""
    assert joined(written) == prose


@pytest.mark.parametrize("seq_length, left", [(7, 0), (9, 4), (11, 0), (23, 0)])
def test_ids_are_cut_into_rows_with_one_more_for_the_last_label(tmp_path, seq_length, left):
    """24 ids of three documents: rows are documents that cross the old ones, and the ids that fill none are dropped."""
    (tmp_path / "in.jsonl").write_text("".join('{"text": "%s"}\n' % " ".join(map(str, ids)) for ids in (
        range(1, 12), range(12, 14), range(14, 22))))
    report = run(settings_of(tmp_path, seq_length=seq_length))
    rows = documents_of(tmp_path / "out_text_document")
    whole = np.concatenate([[*range(1, 12), 1000, 12, 13, 1000, *range(14, 22), 1000]])
    assert [len(row) for row in rows] == [seq_length + 1] * (24 // (seq_length + 1))
    assert np.concatenate(rows).tolist() == whole[:24 - left].tolist()
    assert report.documents == len(rows)
    assert report.notes == {"tokens left at the end, too few for a sequence, and dropped": left}


@pytest.mark.parametrize("content, changes, message", [
    ("a text\n\nof lines\n", {}, r"wiki.train.tokens line 4: .* no line ' = Title = ' is in it"),
    ("= a\n\nb\n", {}, "no line ' = Title = '"),
    (FILE, {"seq_length": 200}, "--seq-length 200: the 145 tokens of text are too few for a sequence of 201"),
    (FILE, {"seq_length": 8, "merge": False}, "--seq-length 8 and --no-merge cannot be combined"),
    (FILE, {"seq_length": 8, "split_sentences": True}, "--seq-length 8 and --split-sentences cannot be combined"),
    (FILE, {"text_unit": "section"}, "--text-unit section is not one of file, line"),
    (FILE, {"input_format": "wikitext", "text_unit": "article", "input": ("-",)}, "are found in files, not"),
    (FILE.encode()[:-8] + b"\xe6\x88", {}, "breaks off within its last line"),
])
def test_what_cannot_be_is_refused(tmp_path, content, changes, message):
    with pytest.raises(ValueError, match=message):
        texts(tmp_path, content, **changes)


def test_memory_is_that_of_an_article(tmp_path, monkeypatch):
    monkeypatch.setattr(wikitext, "MOST_BYTES", 1 << 20)
    assert len(texts(tmp_path, FILE * 100)) == 200
    with pytest.raises(ValueError, match="no heading between blank lines in 1 MB"):
        texts(tmp_path, FILE + "word \n" * (1 << 18))


def test_an_article_that_is_no_text_is_skipped(tmp_path):
    assert texts(tmp_path, FILE.encode().replace(b"Two", b"\xff\xfe")) == [FIRST]


@pytest.mark.parametrize("arguments, form", [
    ([], ("auto", "file")), (["--split-wikitext"], ("wikitext", "article")),
    (["--split-wikitext", "section"], ("wikitext", "section")),
    (["--input-format", "wikitext"], ("wikitext", "article")),
])
def test_the_option_is_the_form_and_the_unit(arguments, form):
    parsed = build_parser().parse_args(["--input", "x", "--output-prefix", "y", *arguments])
    content = settings_from(parsed).content
    assert (content.input_format, content.text_unit) == form


def test_the_option_and_another_form_conflict():
    parsed = build_parser().parse_args("--input x --output-prefix y --split-wikitext --input-format jsonl".split())
    with pytest.raises(ValueError, match="--split-wikitext article conflicts with --input-format jsonl"):
        settings_from(parsed)
