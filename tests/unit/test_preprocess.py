"""Preprocessing: the bytes of .bin and .idx against hand-worked ones and megatron-core's builder; refusals; kills."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_deepseek.data import jsonl
from megatron_deepseek.data.indexed import open_indexed
from megatron_deepseek.data.preprocess import (
    BYTES_PER_TASK, LINES_PER_TASK, PreprocessSettings, id_dtype, preprocess, tasks_of)

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path, documents):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    return str(path)


def settings_of(tmp_path, source="in.jsonl", **changes):
    values = {"input": (str(tmp_path / source),), "output_prefix": str(tmp_path / "out"),
              "tokenizer_type": "NullTokenizer", "tokenizer_model": "1000", "append_eod": True} | changes
    return PreprocessSettings(**values)


def run(settings):
    return preprocess(settings, say=lambda line: None)


def contents(tmp_path, name="out_text_document"):
    return (tmp_path / f"{name}.bin").read_bytes(), (tmp_path / f"{name}.idx").read_bytes()


def test_bytes_worked_by_hand(tmp_path):
    """Three documents, the second empty: it gets no end of document and no sequence, but is counted."""
    write_lines(tmp_path / "in.jsonl", [{"text": "7 8"}, {"text": ""}, {"text": "9"}])
    summary = run(settings_of(tmp_path))
    assert (summary.documents, summary.tokens) == (3, 5)
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


def test_workers_and_compression_change_nothing(tmp_path):
    documents = [{"text": f"{i} {i + 1}", "title": str(i)} for i in range(12 * LINES_PER_TASK + 5)]
    write_lines(tmp_path / "in.jsonl", documents)
    write_lines(tmp_path / "a.jsonl.gz", documents[:70])
    write_lines(tmp_path / "b.jsonl.gz", documents[70:])
    asked = {"json_keys": ("text", "title"), "tokenizer_model": "20000"}
    run(settings_of(tmp_path, **asked))
    run(settings_of(tmp_path, "?.jsonl.gz", workers=2, output_prefix=str(tmp_path / "w"), **asked))
    for key in ("text", "title"):
        assert contents(tmp_path, f"out_{key}_document") == contents(tmp_path, f"w_{key}_document")
    assert open_indexed(str(tmp_path / "w_title_document"), "").ids[::2].tolist() == list(range(len(documents)))


def test_tasks_are_bounded_in_lines_and_bytes(tmp_path):
    lengths = [1] * (LINES_PER_TASK + 1) + [BYTES_PER_TASK] * 2 + [1]
    write_lines(tmp_path / "in.jsonl", ["x" * length for length in lengths])
    assert [len(task) for task in tasks_of([str(tmp_path / "in.jsonl")])] == [LINES_PER_TASK, 2, 1, 1]


def test_an_error_in_a_worker_names_the_line(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"text": "1"}] * (LINES_PER_TASK + 2) + [{"text": "1 5000"}] + [{"text": "1"}])
    with pytest.raises(ValueError, match=rf"in.jsonl line {LINES_PER_TASK + 3}: NullTokenizer: ids from 1 to 5000"):
        run(settings_of(tmp_path, workers=2))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_files_of_a_glob_are_sorted(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl.glob, "glob", lambda pattern: [str(tmp_path / name) for name in ("b", "a", "folder")])
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).touch()
    assert jsonl.find_inputs(["*", str(tmp_path / "b")]) == [str(tmp_path / name) for name in ("a", "b", "b")]


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """NLTK's Punkt with a model that knows one abbreviation, in the files that its downloader would have put there."""
    import nltk
    model = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (model / name).write_text("")
    (model / "abbrev_types.txt").write_text("mr")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])


@pytest.mark.parametrize("keep_newlines, lengths", [(False, [13, 4, 4 + 1]), (True, [14, 6, 4 + 1])])
def test_sentences(tmp_path, punkt, keep_newlines, lengths):
    write_lines(tmp_path / "in.jsonl", [{"text": "Mr. Fox came. Ate.\n\nLeft"}])
    run(settings_of(tmp_path, tokenizer_type="ByteTokenizer", split_sentences=True, keep_newlines=keep_newlines))
    file = open_indexed(str(tmp_path / "out_text_sentence"), "")
    assert file.lengths.tolist() == lengths and file.ids[-1] == 257


@pytest.mark.parametrize("content, message", [
    (b'{"text": "1"}\n\n{"text": \n', "in.jsonl line 3: malformed JSON"),
    (b'{"text": "1"}\n{"body": "1"}\n', r"in.jsonl line 2: no key 'text' \(--json-keys\); it has 'body'"),
    (b'["1"]\n', "in.jsonl line 1: a JSON object is needed, this is a list"),
    (b'{"text": 1}\n', "in.jsonl line 1: key 'text' holds a value of type int, not text"),
    (b'{"text": "\xff"}\n', "in.jsonl line 1: malformed JSON"),
    (b'{"text": "\\ud800"}\n', "in.jsonl line 1: key 'text' holds half a surrogate pair"),
    (b'\n', "no documents there"),
])
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, content, message):
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        run(settings_of(tmp_path))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_cut_gzip_is_refused(tmp_path):
    write_lines(tmp_path / "in.jsonl.gz", [{"text": str(i)} for i in range(100)])
    (tmp_path / "in.jsonl.gz").write_bytes((tmp_path / "in.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match="in.jsonl.gz cannot be read after line"):
        run(settings_of(tmp_path, "in.jsonl.gz"))


@pytest.mark.parametrize("changes, message", [
    ({"input": ("nothing*.jsonl",)}, r"--input nothing\*.jsonl: no such file"),
    ({"output_prefix": "/dev/null/out"}, "--output-prefix /dev/null/out: cannot write there"),
    ({"workers": 0}, "--workers 0: it must be at least 1"),
    ({"json_keys": ("text", "text")}, "--json-keys text text: text is given twice"),
    ({"split_sentences": True, "lang": "klingon"}, "--split-sentences --lang klingon: NLTK has no such Punkt model"),
])
def test_bad_arguments_are_refused(tmp_path, changes, message):
    write_lines(tmp_path / "in.jsonl", [{"text": "1"}])
    with pytest.raises(ValueError, match=message):
        run(settings_of(tmp_path, **changes))


KILLED = """
import os, signal, sys
from megatron_deepseek.data import preprocess
source, prefix, moment = sys.argv[1:]
tasks_of, replace, renames = preprocess.tasks_of, os.replace, []

def killed_after_a_task(paths):
    yield next(tasks_of(paths))
    os.kill(os.getpid(), signal.SIGKILL)

def killed_at_a_rename(*names):
    renames.append(names)
    if len(renames) == int(moment):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

if moment == "reading":
    preprocess.tasks_of = killed_after_a_task
else:
    os.replace = killed_at_a_rename
preprocess.preprocess(preprocess.PreprocessSettings((source,), prefix, "NullTokenizer", "1000"))
"""


@pytest.mark.parametrize("moment", ["reading", "1", "2"])
def test_a_kill_leaves_no_half_dataset(tmp_path, moment):
    """Killed while it reads, or before the first or second rename: the old dataset or none, and the next run works."""
    write_lines(tmp_path / "in.jsonl", [{"text": "1"}])
    run(settings_of(tmp_path))
    old = contents(tmp_path)
    write_lines(tmp_path / "in.jsonl", [{"text": "2 3"}] * (LINES_PER_TASK + 1))
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "in.jsonl", tmp_path / "out", moment], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    if moment == "reading":
        assert contents(tmp_path) == old
    else:
        with pytest.raises(ValueError, match="out_text_document.idx does not exist"):
            open_indexed(str(tmp_path / "out_text_document"), "--data-path")
    run(settings_of(tmp_path))
    assert len(open_indexed(str(tmp_path / "out_text_document"), "").lengths) == LINES_PER_TASK + 1
    assert not list(tmp_path.glob("*.tmp"))


def test_the_tool_takes_megatrons_arguments(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"text": "ab"}])
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "in.jsonl",
               "--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer", "--append-eod", "--workers"]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run([*command, "1", "--log-interval", "10"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "1 documents, 3 tokens" in done.stdout and done.stderr == ""
    done = subprocess.run([*command, "3", "--partitions", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "preprocess_data.py: error: --partitions 2 does not divide --workers 3\n")
