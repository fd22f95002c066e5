"""Full disks under preprocessing, merging and the tools for a first corpus: one line, nothing half, and on it goes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from full_disks import full_after, small_disk

from corpora import contents, documents_of, run, settings_of, write_lines
from megatron_deepseek.cli.indexed_dataset import main
from megatron_deepseek.data.indexed import written_whole
from megatron_deepseek.data.preprocess.selection import append_by

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def left_over(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tmp"))


@pytest.mark.parametrize("limit, file", [(40, "out.parts/plan.json.0'$"), (900, "out.parts/0000000.*tmp'$"),
                                         (5000, "out_text_document.idx.tmp'$")])
def test_preprocessing_names_the_file_and_continues(tmp_path, limit, file):
    """At the plan, at a part, at the merge."""
    write_lines(tmp_path / "in.jsonl", [{"text": f"{i} {i}"} for i in range(400)])
    asked = {"part_bytes": 2500, "append_eod": False, "overwrite": False}
    straight = run(settings_of(tmp_path, output_prefix=str(tmp_path / "straight"), **asked))
    with full_after(limit), pytest.raises(ValueError, match=f"--output-prefix {tmp_path}/out: cannot write there: .*"
                                                            f"File too large: '{tmp_path}/{file}") as caught:
        run(settings_of(tmp_path, **asked))
    assert "\n" not in str(caught.value) and not left_over(tmp_path)
    report = run(settings_of(tmp_path, **asked))
    assert report.documents == straight.documents == 400 and contents(tmp_path) == contents(tmp_path,
                                                                                            "straight_text_document")


def test_rows_that_a_disk_takes_half_of_are_not_lost_in_silence(tmp_path):
    """Unbuffered, a write of which only a part fits says so by its count alone."""
    rows = np.arange(100, dtype="<u4")
    with full_after(250), pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/0'"):
        append_by(np.zeros(100, np.int64), rows, lambda group: str(tmp_path / str(group)))


def write_dataset(prefix, tokens):
    with written_whole([str(prefix)], "<u2") as (writer,):
        writer.add(np.arange(tokens, dtype="<u2"), [[tokens]])


def test_a_writer_that_finds_no_room_names_its_file_and_leaves_none(tmp_path):
    """What is still in the buffer of another one meets the full disk when that is closed."""
    with full_after(100), pytest.raises(OSError, match=f"File too large: '{tmp_path}/a.bin.tmp'"):
        with written_whole([str(tmp_path / "a"), str(tmp_path / "b")], "<u2") as writers:
            for tokens in (100, 9000):
                for writer in writers:
                    writer.add(np.arange(tokens, dtype="<u2"), [[tokens]])
    assert not list(tmp_path.iterdir())


def test_a_merge_on_a_full_file_system(tmp_path, capsys):
    for name in "ab":
        write_dataset(tmp_path / name, 40_000)
    with small_disk(tmp_path / "disk", 100_000) as disk:
        assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output-prefix", str(disk / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"error: {disk}/out.bin.tmp: No space left on device" in said
        assert not list(disk.iterdir())


@pytest.mark.parametrize("limit, file", [(100, "out.bin.tmp"), (81, "out.bin.tmp"), (80, "out.idx.tmp")])
def test_merging_names_the_file_and_leaves_nothing(tmp_path, capsys, limit, file):
    for name in "ab":
        write_dataset(tmp_path / name, 60 if limit == 100 else 41 if limit == 81 else 20)
    both = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output-prefix", str(tmp_path / "out")]
    with full_after(limit):
        assert main(both) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"error: {tmp_path}/{file}: File too large" in said
    assert not left_over(tmp_path) and not list(tmp_path.glob("out*"))
    assert main(both) == 0


def test_merge_and_split_replace_nothing_unasked(tmp_path, capsys):
    for name in "ab":
        write_dataset(tmp_path / name, 20)
    merge = ["merge", str(tmp_path / "a"), "--output-prefix", str(tmp_path / "out")]
    assert main(merge) == 0
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    for command in (merge, ["split", str(tmp_path / "a"), "--parts", "1", "--output-prefix", str(tmp_path / "out")]):
        (tmp_path / "out_0.idx").touch()
        capsys.readouterr()
        assert main(command) == 2 and (tmp_path / "out.bin").stat().st_mtime_ns == before
        assert "exists already; --overwrite replaces it" in capsys.readouterr().err
        assert main([*command, "--overwrite"]) == 0
        before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert main(["merge", str(tmp_path / "a"), "--output-prefix", f"{tmp_path}/"]) == 2
    assert "that is a directory" in capsys.readouterr().err
    assert documents_of(tmp_path / "out") == documents_of(tmp_path / "out_0") == [list(range(20))]


def tool(name, *arguments, limit=None):
    command = [sys.executable, TOOLS / name, *map(str, arguments)]
    with full_after(limit) if limit else full_after(1 << 40):
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})


def test_a_corpus_or_tokenizer_that_finds_no_room_leaves_nothing(tmp_path):
    done = tool("make_corpus.py", "--output", tmp_path / "x.jsonl", "--max-bytes", 300_000, limit=100_000)
    assert (done.returncode, done.stdout) == (2, "") and not list(tmp_path.iterdir())
    assert done.stderr == f"make_corpus.py: error: {tmp_path}/x.jsonl.tmp: File too large\n"
    (tmp_path / "in.jsonl").write_text('{"text": "a few words of text"}\n' * 10)
    done = tool("train_tokenizer.py", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "t.json", "--vocab-size",
                280, limit=1000)
    assert done.returncode == 2 and f"error: {tmp_path}/t.json.tmp: File too large" in done.stderr
    assert not left_over(tmp_path) and not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("name", ["make_corpus.py", "train_tokenizer.py"])
def test_a_directory_is_no_output(tmp_path, name):
    asked = ["--input", tmp_path] if name == "train_tokenizer.py" else []
    done = tool(name, *asked, "--output", tmp_path)
    assert done.returncode == 2 and done.stderr == (
        f"{name}: error: --output {tmp_path} is a directory; give the name of a file in it\n")
