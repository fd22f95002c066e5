"""Preprocessing: the bytes of .bin and .idx against hand-worked ones and megatron-core's; refusals; the tool."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from corpora import contents, documents_of, run, settings_of, write_bytes, write_lines
from megatron_deepseek.data.indexed import open_indexed
from megatron_deepseek.data.preprocess import inputs
from megatron_deepseek.data.preprocess.part import id_dtype

ROOT = Path(__file__).resolve().parents[4]
TOOL = ROOT / "tools" / "preprocess_data.py"


def test_bytes_worked_by_hand(tmp_path):
    """Three documents, the second empty: it gets no end of document and no sequence, but is counted."""
    write_lines(tmp_path / "in.jsonl", [{"text": "7 8"}, {"text": ""}, {"text": "9"}])
    report = run(settings_of(tmp_path))
    assert (report.documents, report.tokens) == (3, 5)
    assert report.notes == {"empty, kept as documents without tokens": 1}
    data, index = contents(tmp_path)
    assert data == struct.pack("<5H", 7, 8, 1000, 9, 1000)
    assert index == (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 4) + struct.pack("<2i", 3, 2)
                     + struct.pack("<2q", 0, 6) + struct.pack("<4q", 0, 1, 1, 2))


@pytest.mark.parametrize("num_ids", ["1000", "70000"])
def test_bytes_are_those_of_megatron_core(tmp_path, num_ids):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    documents = [[[1, 2, 3], [4]], [], [[5], [], [6, 7]], [[8] * 300]]
    write_lines(tmp_path / "in.jsonl", [{"text": [" ".join(map(str, part)) for part in parts]} for parts in documents])
    run(settings_of(tmp_path, tokenizer_model=num_ids, append_eod=False))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(int(num_ids) + 1))
    for parts in documents:
        builder.add_document(torch.tensor(sum(parts, [])), [len(part) for part in parts if part])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert contents(tmp_path) == contents(tmp_path, "theirs")


def test_dtype_is_megatrons():
    assert (id_dtype(65499), id_dtype(65500)) == (np.uint16, np.int32)


def write_parquet(path, documents):
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(documents), path, row_group_size=100)


def test_nothing_but_the_input_decides_the_bytes(tmp_path):
    """Formats, compressions, workers, parts inside files and across them, two ranks: all the same dataset."""
    documents = [{"text": f"{i} {i + 1}", "meta": {"title": str(i)}} for i in range(1200)]
    asked = {"json_keys": ("text", "meta.title"), "tokenizer_model": "20000"}
    write_lines(tmp_path / "in.jsonl", documents)
    run(settings_of(tmp_path, **asked))
    assert documents_of(tmp_path / "out_meta.title_document") == [[i, 20000] for i in range(1200)]
    for suffix in ("", ".gz", ".xz", ".zst"):
        folder = tmp_path / f"folder{suffix}"
        (folder / "below").mkdir(parents=True)
        write_lines(folder / f"a.jsonl{suffix}", documents[:1000])
        write_lines(folder / "below" / f"b.json{suffix}", documents[1000:])
        (folder / "notes.pdf").write_text("no corpus")
    (tmp_path / "rows").mkdir()
    write_parquet(tmp_path / "rows" / "a.parquet", documents[:1000])
    write_parquet(tmp_path / "rows" / "b.parquet", documents[1000:])
    for source, execution in (("folder", {"workers": 2, "part_bytes": 3000}), ("folder.gz", {"part_bytes": 2000}),
                              ("folder.xz", {"part_bytes": 1500}), ("folder.zst", {"workers": 2}),
                              ("rows", {"workers": 2, "part_bytes": 2000}), ("folder", {"world_size": 2})):
        if "world_size" in execution:
            assert run(settings_of(tmp_path, source, output_prefix=str(tmp_path / "w"), rank=1, **asked, **execution,
                                   part_bytes=5000)) is None
            execution = execution | {"rank": 0}
        report = run(settings_of(tmp_path, source, output_prefix=str(tmp_path / "w"), **asked, **execution))
        assert report.parts > 2 or "part_bytes" not in execution
        for key in ("text", "meta.title"):
            assert contents(tmp_path, f"w_{key}_document") == contents(tmp_path, f"out_{key}_document"), source
    assert not list(tmp_path.glob("*.parts"))


def test_plain_text_is_one_document_a_file_or_a_line(tmp_path):
    write_bytes(tmp_path / "in.txt.gz", b"\xef\xbb\xbfab\n\ncd\r\n")
    asked = {"tokenizer_type": "ByteTokenizer", "source": "in.txt.gz"}
    run(settings_of(tmp_path, **asked))
    assert documents_of(tmp_path / "out_text_document") == [[*b"ab\n\ncd\r\n", 257]]
    run(settings_of(tmp_path, text_unit="line", append_bos=True, **asked))
    assert documents_of(tmp_path / "out_text_document") == [[256, *b"ab", 257], [256, *b"cd", 257]]


def test_files_of_a_glob_are_sorted(tmp_path, monkeypatch):
    found = [str(tmp_path / name) for name in ("b", "a", "folder")]
    monkeypatch.setattr(inputs.glob, "glob", lambda pattern, recursive: found)
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).touch()
    assert inputs.find_paths(["*", str(tmp_path / "b")]) == [str(tmp_path / name) for name in ("a", "b", "b")]


@pytest.fixture
def punkt(tmp_path):
    """The folder of a Punkt model that knows one abbreviation, as NLTK's downloader would have made it."""
    model = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (model / name).write_text("")
    (model / "abbrev_types.txt").write_text("mr")
    return str(tmp_path / "nltk")


@pytest.mark.parametrize("keep_newlines, lengths", [(False, [13, 4, 4 + 1]), (True, [14, 6, 4 + 1])])
def test_sentences(tmp_path, punkt, keep_newlines, lengths):
    write_lines(tmp_path / "in.jsonl", [{"text": "Mr. Fox came. Ate.\n\nLeft"}])
    run(settings_of(tmp_path, tokenizer_type="ByteTokenizer", split_sentences=True, keep_newlines=keep_newlines,
                    nltk_data_dir=punkt))
    file = open_indexed(str(tmp_path / "out_text_sentence"), "")
    assert file.lengths.tolist() == lengths and file.ids[-1] == 257


def test_sentences_learned_from_the_input(tmp_path):
    """No model of this language is installed: Punkt sees that `xyz.` is followed by small letters, and says so."""
    from megatron_deepseek.data.preprocess.run import preprocess
    text = "The xyz. test ran. It was good. An xyz. test again. So it was. "
    write_lines(tmp_path / "in.jsonl", [{"text": text}] * 50)
    said = []
    preprocess(settings_of(tmp_path, tokenizer_type="ByteTokenizer", split_sentences=True, lang="klingon"), said.append)
    assert len(said) == 1 and "--lang klingon: no Punkt model" in said[0] and "first 3150 characters" in said[0]
    first = bytes(documents_of(tmp_path / "out_text_sentence")[0])
    assert first == b"The xyz. test ran."


GOOD = b'{"text": "1"}\n'


@pytest.mark.parametrize("content, reason, message", [
    (GOOD + b'\n{"text": \n', "malformed JSON", "in.jsonl line 3: malformed JSON"),
    (GOOD + b'{"body": "1"}\n', "missing key", r"in.jsonl line 2: no key 'text' \(--json-keys\); it has 'body'"),
    (GOOD + b'["1"]\n', "not an object", "in.jsonl line 2: a JSON object is needed, this is a list"),
    (GOOD + b'{"text": 1}\n', "not text", "in.jsonl line 2: key 'text' holds a value of type int, not text"),
    (GOOD + b'{"text": null}\n', "not text", "in.jsonl line 2: key 'text' holds a value of type NoneType, not text"),
    (GOOD + b'{"text": "\xff"}\n', "invalid UTF-8", "in.jsonl line 2: invalid UTF-8: invalid start byte at byte 10"),
    (GOOD + b'{"text": "\\ud800"}\n', "half a surrogate pair", "in.jsonl line 2: key 'text' holds half a surrogate"),
    (GOOD + b'\0\0\0\n', "malformed JSON", "in.jsonl line 2: malformed JSON"),
    (GOOD + b"[" * 100_000 + b"\n", "malformed JSON", "in.jsonl line 2: malformed JSON: nested too deeply"),
    (GOOD + b'{"text": "1 5000"}\n', "id outside the vocabulary", "line 2: NullTokenizer: ids from 1 to 5000, not in"),
    (GOOD + b'{"text": "one"}\n', "cannot be tokenised", "in.jsonl line 2: invalid literal for int"),
])
def test_bad_input_is_skipped_and_reported_or_refused(tmp_path, content, reason, message):
    (tmp_path / "in.jsonl").write_bytes(content + GOOD)
    report = run(settings_of(tmp_path))
    assert report.documents == 2 and documents_of(tmp_path / "out_text_document") == [[1, 1000]] * 2
    assert report.skipped == {reason: 1} and len(report.errors) == 1
    with pytest.raises(ValueError, match=message) as caught:
        run(settings_of(tmp_path, on_error="fail", output_prefix=str(tmp_path / "other")))
    assert report.errors == [str(caught.value)] and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("other_*"))


def test_lines_are_counted_over_parts(tmp_path):
    """Parts begin inside the file, where nobody has counted its lines: the report and a refusal know them still."""
    write_lines(tmp_path / "in.jsonl", [{"text": "1"} if i % 7 else {"body": i} for i in range(1, 100)])
    report = run(settings_of(tmp_path, workers=2, part_bytes=100))
    assert report.parts > 9
    assert [error.partition(":")[0].split()[-1] for error in report.errors] == [str(i) for i in range(7, 100, 7)]
    with pytest.raises(ValueError, match=r"in.jsonl line (7|14): no key"):
        run(settings_of(tmp_path, max_errors=0, part_bytes=100))


def test_errors_past_the_limit_end_the_run_and_a_higher_limit_continues_it(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"text": "1"} if i % 7 else {"body": i} for i in range(1, 100)])
    with pytest.raises(ValueError, match="--max-errors 5: [67] documents cannot be used so far.*line 7: no key"):
        run(settings_of(tmp_path, max_errors=5, part_bytes=100))
    report = run(settings_of(tmp_path, max_errors=20, part_bytes=100))
    assert report.parts_reused > 3 and report.documents == 85


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("part_bytes", [20_000, 1_000_000])
def test_of_a_cut_file_all_whole_lines_are_kept_and_the_rest_is_reported(tmp_path, suffix, part_bytes):
    generator = np.random.default_rng(0)
    path = tmp_path / f"in.jsonl{suffix}"
    documents = [" ".join(map(str, generator.integers(0, 1000, 50))) for _ in range(1500)]
    write_lines(path, [{"text": text} for text in documents])
    path.write_bytes(path.read_bytes()[:-200])
    asked = {"part_bytes": part_bytes, "append_eod": False, "max_errors": 0}
    with pytest.raises(ValueError, match=rf"in.jsonl{suffix} line \d+: cannot be read any further: the .* breaks off "
                                         rf"at its byte {path.stat().st_size}. --allow-damaged-files 1 would"):
        run(settings_of(tmp_path, path.name, **asked))
    report = run(settings_of(tmp_path, path.name, allow_damaged_files=1, **asked))
    kept = documents_of(tmp_path / "out_text_document")
    assert 500 < len(kept) < 1500  # zstd holds back the last block, of up to 128 KB
    assert kept == [list(map(int, text.split())) for text in documents[:len(kept)]]
    assert not report.skipped and not report.errors
    described, = report.damaged
    assert f"in.jsonl{suffix} line {len(kept) + 1}: cannot be read any further" in described
    assert described.endswith(f"; {len(kept)} of its documents were taken")
    assert f"damaged: {described}" in report.lines()


def test_bad_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"1", b"\xff", b"2"]).buffers())
    parquet.write_table(pyarrow.table({"text": text, "other": ["1", None, "3"]}), tmp_path / "in.parquet")
    report = run(settings_of(tmp_path, "in.parquet", append_eod=False))
    assert documents_of(tmp_path / "out_text_document") == [[1], [2]] and report.skipped == {"invalid UTF-8": 1}
    assert report.errors[0].endswith("in.parquet row 2: invalid UTF-8: invalid start byte at byte 0")
    report = run(settings_of(tmp_path, "in.parquet", json_keys=("other",)))
    assert report.documents == 2 and report.skipped == {"not text": 1}
    with pytest.raises(ValueError, match="no documents there; skipped 3: missing key; first: .* row 1: no key"):
        run(settings_of(tmp_path, "in.parquet", json_keys=("body",)))


def test_a_run_that_found_nothing_is_not_in_the_way_of_the_right_one(tmp_path):
    """A wrong --json-keys leaves no parts, which the right ones would have to discard."""
    write_lines(tmp_path / "in.jsonl", [{"text": "1"}, {"text": "2"}])
    with pytest.raises(ValueError, match="no documents there; skipped 2: missing key"):
        run(settings_of(tmp_path, "in.jsonl", json_keys=("body",)))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert run(settings_of(tmp_path, "in.jsonl")).documents == 2


@pytest.mark.parametrize("changes, message", [
    ({"input": ("nothing*.jsonl",)}, r"--input nothing\*.jsonl: no such file"),
    ({"input": ("-", "x")}, "--input - x: standard input goes alone"),
    ({"output_prefix": "/dev/null/out"}, "--output-prefix /dev/null/out: cannot write there"),
    ({"workers": 0}, "--workers 0: it must be at least 1"),
    ({"json_keys": ("text", "text")}, "--json-keys text text: text is given twice"),
    ({"json_keys": ("a/b",)}, "--json-keys a/b: names a file"),
    ({"min_chars": 9, "max_chars": 8}, "--max-chars 8: it must be at least 9"),
    ({"fim_rate": 1.5}, "--fim-rate 1.5: it must be from 0 to 1"),
    ({"fim_rate": 0.5}, "--fim-rate: the tokenizer .* has no such special tokens"),
    ({"append_bos": True}, "--append-bos: the tokenizer .* has no such special tokens"),
    ({"rank": 2, "world_size": 2}, r"--rank 2 is not in \[0, --world-size 2\)"),
    ({"tokenizer_backend": "gigatoken"}, "--tokenizer-backend gigatoken is for HuggingFaceTokenizer only"),
])
def test_bad_arguments_are_refused(tmp_path, changes, message):
    write_lines(tmp_path / "in.jsonl", [{"text": "1"}])
    with pytest.raises(ValueError, match=message):
        run(settings_of(tmp_path, **changes))


def test_no_documents_are_refused_with_the_reasons(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n[]\n")
    with pytest.raises(ValueError, match="no documents there; skipped 1: not an object; first: .* line 2: a JSON"):
        run(settings_of(tmp_path))


def test_the_report(tmp_path):
    lengths = [0, 1, 2, 3, 300, 5]
    write_lines(tmp_path / "in.jsonl", [{"text": " ".join(["7"] * length)} for length in lengths])
    report = run(settings_of(tmp_path, append_eod=False, part_bytes=20, min_chars=0, max_chars=700))
    written = json.loads((tmp_path / "out_report.json").read_text())
    assert (written["documents"], written["tokens"]) == (6, 311)
    assert written["chars"] == sum(max(0, 2 * length - 1) for length in lengths)
    dataset, = written["datasets"]["text"]
    assert (dataset["shortest"], dataset["longest"], dataset["bin_bytes"]) == (0, 300, 622)
    assert [(each["shortest"], each["documents"]) for each in dataset["histogram"] if each["documents"]] == [
        (0, 1), (1, 1), (2, 2), (4, 1), (256, 1)]
    assert "311 tokens in" in report.lines()[0] and "tokens in a document: 0 to 300" in report.lines()[-1]
    report = run(settings_of(tmp_path, append_eod=False, min_chars=2, max_chars=10))
    assert report.documents == 3
    assert report.skipped == {"shorter than --min-chars 2": 2, "longer than --max-chars 10": 1}


def test_memory_does_not_grow_with_a_document(tmp_path):
    """A document of 20 MB: as line, text and list of ids 200 MB. Each process may have 110 MB, 50 are Python's."""
    write_lines(tmp_path / "in.jsonl", [{"text": "ab"}, {"text": "The quick brown fox " * 1_000_000}, {"text": "c"}])
    command = [sys.executable, TOOL, "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out",
               "--tokenizer-type", "ByteTokenizer"]
    limited = lambda: resource.setrlimit(resource.RLIMIT_DATA, (110 << 20, 110 << 20))  # noqa: E731
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limited)
    assert done.returncode == 0, done.stderr
    assert open_indexed(str(tmp_path / "out_text_document"), "").lengths.tolist() == [2, 20_000_000, 1]


def test_the_tool_takes_megatrons_arguments(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"text": "ab"}])
    command = [sys.executable, TOOL, "--input", tmp_path / "in.jsonl",
               "--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer", "--append-eod", "--workers"]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run([*command, "1", "--log-interval", "10"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "1 documents, 3 tokens" in done.stdout and done.stderr == ""
    done = subprocess.run([*command, "3", "--partitions", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "preprocess_data.py: error: --partitions 2 does not divide --workers 3\n")
