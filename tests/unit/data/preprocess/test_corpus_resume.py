"""Killed at any moment and continued, preprocessing gives the same bytes; what has changed meanwhile is recognised."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import corpora
import pytest
from corpora import contents, documents_of, run, settings_of, write_lines
from megatron_deepseek.data.preprocess import ledger
from megatron_deepseek.data.preprocess.ledger import Ledger
from megatron_deepseek.data.preprocess.workers import run_tasks

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from corpora import run, settings_of
from pathlib import Path
from megatron_deepseek.data import indexed
from megatron_deepseek.data.preprocess import assembly, part, run as whole
folder, moment, count = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
selection = {"dedup": "exact", "shuffle_seed": 3} if moment == "gather" else {}

def kill_at(module, name):
    original, calls = getattr(module, name), []
    def replaced(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(module, name, replaced)

if moment == "parent":  # while its worker works
    original = whole.check_errors
    def replaced(settings, parts, summaries):
        original(settings, parts, summaries)
        if len(summaries) == count:
            os.kill(os.getpid(), signal.SIGKILL)
    whole.check_errors = replaced
else:
    kill_at(*{"writing": (part.PartMaker, "make"), "summary": (part, "write_json"), "gather": (assembly, "gather"),
              "merge": (assembly, "merge_datasets"), "rename": (indexed.os, "replace"),
              "report": (whole, "write_json")}[moment])
run(settings_of(folder, input=tuple(sorted(map(str, folder.glob("in*")))), part_bytes=1200,
                allow_damaged_files=1, **selection))
"""


def kill_at(folder, moment, count):
    code = [sys.executable, "-c", KILLED, os.path.dirname(corpora.__file__), folder, moment, str(count)]
    return subprocess.run(code, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    documents = [{"text": f"{i} {i % 50}"} for i in range(600)] + [{"text": "7 7"}] * 40
    write_lines(tmp_path / "in1.jsonl", documents[:300])
    write_lines(tmp_path / "in2.jsonl.gz", documents[300:])
    return tmp_path


def settings_in(folder, **changes):
    return settings_of(folder, input=(str(folder / "in1.jsonl"), str(folder / "in2.jsonl.gz")), **changes)


@pytest.mark.parametrize("moment, count", [("writing", 3), ("summary", 4), ("parent", 2), ("gather", 1), ("merge", 1),
                                           ("report", 1)])
def test_killed_and_continued(folder, moment, count):
    selection = {"dedup": "exact", "shuffle_seed": 3} if moment == "gather" else {}
    run(settings_in(folder, output_prefix=str(folder / "straight"), **selection))
    done = kill_at(folder, moment, count)
    assert done.returncode != 0, done.stderr
    assert not (folder / "out_text_document.idx").exists() or moment == "report"
    report = run(settings_in(folder, workers=2, **selection))
    assert report.parts_reused >= (2 if moment in ("writing", "parent") else 3)
    assert contents(folder) == contents(folder, "straight_text_document")
    assert not list(folder.glob("*.tmp")) and not (folder / "out.parts").exists()


@pytest.mark.parametrize("moment, count", [("writing", 3), ("summary", 4)])
def test_killed_and_continued_over_a_damaged_file(folder, moment, count):
    path = folder / "in2.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-300])
    straight = run(settings_in(folder, output_prefix=str(folder / "straight"), allow_damaged_files=1))
    assert kill_at(folder, moment, count).returncode != 0
    report = run(settings_in(folder, workers=2, allow_damaged_files=1))
    assert report.parts_reused >= 2 and 300 < report.documents < 640
    assert contents(folder) == contents(folder, "straight_text_document") and report.damaged == straight.damaged
    assert f"{path} line {report.documents - 299}: cannot be read any further: the gzip file br" in report.damaged[0]


def test_an_interrupted_run_keeps_the_old_dataset(folder):
    write_lines(folder / "old.jsonl", [{"text": "1"}])
    run(settings_of(folder, "old.jsonl"))
    assert kill_at(folder, "merge", 1).returncode == -signal.SIGKILL
    assert documents_of(folder / "out_text_document") == [[1, 1000]]


def stop_halfway(folder, **changes):
    """A bad line in the second file and no tolerance: the parts of the first are made."""
    with pytest.raises(ValueError, match="no key"):
        run(settings_in(folder, max_errors=0, part_bytes=1500, **changes))


@pytest.fixture
def stopped(folder):
    write_lines(folder / "in2.jsonl.gz", [{"text": "1 2"}] * 100 + [{"body": "1"}])
    stop_halfway(folder)
    assert len(list((folder / "out.parts").glob("*_text.idx"))) >= 3
    return folder


@pytest.mark.parametrize("changes, message", [
    ({"append_eod": False}, "append_eod was True and is False"),
    ({"tokenizer_model": "2000"}, "tokenizer was '1000' and is '2000'"),
    ({"dedup": "exact"}, "dedup was None and is 'exact'"),
    ({"part_bytes": 999}, None),
])
def test_changed_arguments_are_recognised(stopped, changes, message):
    if message is None:  # what decides no byte: the parts keep their size
        report = run(settings_in(stopped, **changes))
        assert report.parts_reused >= 3 and report.documents == 400
        return
    with pytest.raises(ValueError, match=f"out.parts holds parts of another run: {message}.* --discard-parts"):
        run(settings_in(stopped, **changes))
    report = run(settings_in(stopped, discard_parts=True, **changes))
    assert report.parts_reused == 0


def test_changed_input_is_recognised(stopped):
    status = os.stat(stopped / "in1.jsonl")
    os.utime(stopped / "in1.jsonl", ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another run: .*in1.jsonl has changed since"):
        run(settings_in(stopped))
    with pytest.raises(ValueError, match="another run: the input was 2 files and is 1"):
        run(settings_of(stopped, "in1.jsonl"))


def test_a_damaged_part_is_made_again(stopped):
    path = sorted((stopped / "out.parts").glob("*_text.bin"))[0]
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    run(settings_in(stopped))
    run(settings_in(stopped, output_prefix=str(stopped / "straight")))
    assert contents(stopped) == contents(stopped, "straight_text_document")


@pytest.mark.parametrize("change", [lambda text: text.replace('"documents": ', '"documents": 1'),
                                    lambda text: text.replace('"errors": []', '"errors": [[0, 1, "x", "y"]]'),
                                    lambda text: text[:-30], lambda text: "[" * 100_000])
def test_a_damaged_summary_of_a_part_is_not_believed(stopped, change):
    path = sorted((stopped / "out.parts").glob("0*.json"))[0]
    path.write_text(change(path.read_text()))
    report = run(settings_in(stopped))
    assert (report.documents, len(report.errors)) == (400, 1)


def test_a_worker_destroys_nothing_of_its_parent(tmp_path):
    """Its garbage, such as a process group of gloo, may wait in a destructor for threads that are not here."""
    class Dropped:
        def __init__(self):
            self.itself = self

        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Dropped()
        collected = list(run_tasks(range(4), lambda task: gc.collect(), workers=2))
    finally:
        gc.enable()
        gc.collect()
    assert len(collected) == 4 and [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_two_at_once_are_refused(folder, monkeypatch):
    monkeypatch.setattr(ledger, "SECONDS_FOR_ORPHANS", 0.1)
    settings = settings_in(folder)
    with Ledger(settings).opened(), pytest.raises(ValueError, match="another process is working on .*out.parts"):
        run(settings)


def pipe(folder, documents, *arguments):
    content = "".join(json.dumps(document) + "\n" for document in documents).encode()
    tool = Path(__file__).parents[4] / "tools" / "preprocess_data.py"
    command = [sys.executable, tool, "--input", "-", "--output-prefix", folder / "out", "--tokenizer-type",
               "NullTokenizer", "--tokenizer-model", "1000", "--part-bytes", "2000", *arguments]
    return subprocess.run(command, input=content, capture_output=True)


def test_standard_input_is_continued_only_with_the_same_text(tmp_path):
    documents = [{"text": f"{i}"} for i in range(600)]
    bad = documents[:500] + [{}] + documents[500:]
    assert pipe(tmp_path, bad, "--max-errors", "0").returncode == 2
    other = [{"text": "3"}] + bad[1:]
    done = pipe(tmp_path, other)
    assert done.returncode == 2 and b"part 0 of it is not what it was" in done.stderr
    done = pipe(tmp_path, bad)
    assert done.returncode == 0 and b"parts were there from before" in done.stdout
    assert documents_of(tmp_path / "out_text_document") == [[i] for i in range(600)]
    assert json.loads((tmp_path / "out_report.json").read_text())["errors"][0].startswith("- line 501: no key")
