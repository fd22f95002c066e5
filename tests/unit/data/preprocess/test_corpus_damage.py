"""Inputs that cannot be read to their ends fail the run, unless so many are allowed; what is whole is read whole."""

import gzip
import json
import lzma
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from corpora import contents, documents_of, run, settings_of, write_lines
from megatron_deepseek.data.preprocess.run import preprocess

TOOL = Path(__file__).resolve().parents[4] / "tools" / "preprocess_data.py"
LINES = b"".join(b'{"text": "%d"}\n' % i for i in range(3))
EXPECTED = [[0], [1], [2]]


def skippable(content: bytes) -> bytes:
    """A frame that zstd passes over, as pzstd writes before each of its own."""
    return struct.pack("<II", 0x184D2A50, len(content)) + content


def with_window(content: bytes, log: int) -> bytes:
    """As `zstd --long=LOG` writes from a pipe: by hand, one raw block after a header that claims the window."""
    header = struct.pack("<IBB", 0xFD2FB528, 0, log - 10 << 3)
    return header + (1 | len(content) << 3).to_bytes(3, "little") + content


def xz(content: bytes, **options) -> bytes:
    return lzma.compress(content, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, **options}])


def zstd(content: bytes) -> bytes:
    import zstandard
    return zstandard.compress(content)


WHOLE = {
    "window of 2 GiB.zst": lambda: with_window(LINES, 31),
    "window of 256 MiB.zst": lambda: with_window(LINES, 28),
    "two frames and one to skip.zst": lambda: skippable(b"x") + zstd(LINES[:20]) + zstd(LINES[20:]) + skippable(b""),
    "dictionary of 256 MiB.xz": lambda: xz(LINES, dict_size=1 << 28),
    "dictionary of 1.5 GiB.xz": lambda: xz(LINES, dict_size=3 << 29),
    "two streams, padded.xz": lambda: xz(LINES[:20]) + bytes(8) + xz(LINES[20:]) + bytes(4),
    "members and an empty one.gz": lambda: gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]) + gzip.compress(b""),
    "padded.gz": lambda: gzip.compress(LINES) + bytes(512),
    "another ending.zst": lambda: gzip.compress(LINES),
    "no line end.jsonl": lambda: LINES[:-1],
    "no line end but a blank.jsonl": lambda: LINES[:-1] + b" ",
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_is_read(tmp_path, name):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(WHOLE[name]())
    report = run(settings_of(tmp_path, name, append_eod=False, max_errors=0))
    assert documents_of(tmp_path / "out_text_document") == EXPECTED and not report.damaged


def parquet(content=None) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": [str(i) for i in range(200)], "title": ["t"] * 200}), sink,
                        row_group_size=50, write_page_checksum=True, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


# File name: (its content, documents before the damage, what is said)
DAMAGED = {
    "cut.gz": (lambda: gzip.compress(LINES)[:-9], None, r"line \d: cannot be read any further: the gzip file breaks"),
    "cut.xz": (lambda: xz(LINES)[:-5], 3, "line 4: cannot be read any further: the xz file breaks off at its byte"),
    "cut.zst": (lambda: zstd(LINES) + zstd(LINES)[:9], 3, "line 4: cannot be read any further: the zstd file breaks"),
    "flipped.gz": (lambda: gzip.compress(LINES) + flipped(gzip.compress(LINES), -6), 3,
                   "line 4: .*damaged gzip before its byte"),
    "garbage behind.gz": (lambda: gzip.compress(LINES) + b"garbage", 3,
                          "line 4: .*damaged gzip before its byte .*, behind the end of 1 sound stream: "),
    "garbage behind.zst": (lambda: zstd(LINES) + b"garbage", 3,
                           "line 4: .*damaged zstd before its byte .*, behind the end of 1 sound stream: "),
    "empty.gz": (lambda: b"", 0, "line 1: .*the gzip file is empty, without even a header"),
    "cut within.jsonl": (lambda: LINES + b'{"text": "3', 3, "line 4: the file breaks off within its last line: malf"),
    "cut before.jsonl.gz": (lambda: gzip.compress(LINES + b'{"text"'), 3, "line 4: the file breaks off within its la"),
    "zeros.jsonl": (lambda: LINES + bytes(20), 3, "line 4: the file breaks off within its last line"),
    "half a character.txt": (lambda: "0 é".encode()[:-1], 0, "line 1: the file breaks off within its last line: inval"),
    "cut.parquet": (lambda: parquet()[:-60], 0, "row 1: cannot be read any further"),
    "page.parquet": (lambda: flipped(parquet(), parquet().find(b"\3\0\0\x00199") + 5), 150,
                     "row 151: cannot be read any further"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_to_its_end_fails_or_is_allowed_and_named(tmp_path, name):
    content, before, message = DAMAGED[name]
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(content())
    (tmp_path / "whole.jsonl").write_bytes(LINES)
    both = {"input": (str(tmp_path / name), str(tmp_path / "whole.jsonl")), "append_eod": False}
    with pytest.raises(ValueError, match=f"{name} {message}.*--allow-damaged-files 1 would") as caught:
        run(settings_of(tmp_path, **both))
    assert "\n" not in str(caught.value) and ".." not in str(caught.value)
    assert not (tmp_path / "out_text_document.idx").exists()
    report = run(settings_of(tmp_path, allow_damaged_files=1, max_errors=0, **both))
    documents = documents_of(tmp_path / "out_text_document")
    assert documents[-3:] == EXPECTED and documents[:-3] == [[i] for i in range(len(documents) - 3)]
    assert len(documents) - 3 == before if before is not None else len(documents) >= 3
    described, = report.damaged
    assert name in described and described.endswith(f"; {len(documents) - 3} of its documents were taken")
    assert json.loads((tmp_path / "out_report.json").read_text())["damaged"] == [described]


def test_bad_lines_are_no_damage_and_damage_is_no_bad_line(tmp_path):
    """A last line that is JSON but nothing to use is a bad line, with or without its end."""
    (tmp_path / "in.jsonl").write_bytes(LINES + b'{"body": 1}')
    with pytest.raises(ValueError, match="--max-errors 0 documents cannot be used"):
        run(settings_of(tmp_path, max_errors=0, allow_damaged_files=9))
    assert run(settings_of(tmp_path, max_errors=1, discard_parts=True)).skipped == {"missing key": 1}
    (tmp_path / "in.jsonl").write_bytes(LINES + b'{"text": \n')
    assert run(settings_of(tmp_path, max_errors=1, discard_parts=True)).skipped == {"malformed JSON": 1}


@pytest.mark.parametrize("execution", [{"workers": 2}, {"world_size": 2}])
def test_damaged_files_are_counted_over_parts_and_ranks(tmp_path, execution):
    """A file is one however many of its parts are hurt."""
    for name in "abc":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(LINES * 40)[:-6])
    both = {"input": (str(tmp_path),), "append_eod": False, "part_bytes": 20, **execution}

    def of_all_ranks(**changes):
        reports = (run(settings_of(tmp_path, rank=rank, **both, **changes))
                   for rank in range(execution.get("world_size", 1)))
        return next(report for report in reports if report is not None)  # of the rank that finds all parts there
    with pytest.raises(ValueError, match="--allow-damaged-files 2: 3 files cannot be read to their ends so far, such"):
        of_all_ranks(allow_damaged_files=2)
    report = of_all_ranks(allow_damaged_files=3)
    assert report.parts_reused > 9 and len(report.damaged) == 3 and report.documents == 360
    assert all("120 of its documents were taken" in each for each in report.damaged)


def test_a_run_over_damaged_files_is_continued_to_the_same_bytes(tmp_path):
    """Stopped after the damaged parts were made, with a lower limit then, and with the same again."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES * 400)[:-6])
    write_lines(tmp_path / "b.jsonl", [{"text": str(i)} for i in range(50)] + [{}])
    both = {"input": (str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl")), "part_bytes": 60}
    straight = run(settings_of(tmp_path, output_prefix=str(tmp_path / "straight"), allow_damaged_files=1, **both))
    with pytest.raises(ValueError, match="--max-errors"):
        run(settings_of(tmp_path, allow_damaged_files=1, max_errors=0, **both))
    with pytest.raises(ValueError, match="--allow-damaged-files 0: 1 files cannot be read"):
        run(settings_of(tmp_path, **both))
    report = run(settings_of(tmp_path, allow_damaged_files=1, **both))
    assert report.parts_reused > 3 and report.damaged == straight.damaged
    assert contents(tmp_path) == contents(tmp_path, "straight_text_document")


def test_a_finished_dataset_is_replaced_only_when_told_to(tmp_path):
    """The same command finds nothing to do; another input or argument, or files that are not its own, end it."""
    write_lines(tmp_path / "in.jsonl", [{"text": "1"}])
    write_lines(tmp_path / "other.jsonl", [{"text": "2"}])
    asked = {"append_eod": False, "overwrite": False}
    assert run(settings_of(tmp_path, **asked)).documents == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    said = []
    assert preprocess(settings_of(tmp_path, workers=2, **asked), said.append) is None
    assert len(said) == 1 and "finished before, by this very command" in said[0]
    refusal = f"--output-prefix {tmp_path}/out: {tmp_path}/out_text_document.idx exists already, made from another"
    for source, changes in (("other.jsonl", {}), ("in.jsonl", {"append_eod": True}), ("in.jsonl", {"shuffle_seed": 1}),
                            ("in.jsonl", {"merge": False}), ("other.jsonl", {"discard_parts": True})):
        with pytest.raises(ValueError, match=f"{refusal} input or by other arguments; --overwrite replaces it"):
            run(settings_of(tmp_path, source, **asked | changes))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    run(settings_of(tmp_path, "other.jsonl", **asked | {"overwrite": True}))
    assert documents_of(tmp_path / "out_text_document") == [[2]]
    (tmp_path / "out_text_document.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="its files are not what this command made once; --overwrite makes them"):
        run(settings_of(tmp_path, "other.jsonl", **asked))
    (tmp_path / "out_report.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="exists already"):
        run(settings_of(tmp_path, "other.jsonl", **asked))


def test_a_finished_dataset_does_not_pass_a_stricter_limit(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"[]\n" + LINES + b'{"te')
    run(settings_of(tmp_path, overwrite=False, allow_damaged_files=1))
    (tmp_path / "out.parts").mkdir()  # what a kill at the very end leaves
    assert run(settings_of(tmp_path, overwrite=False, allow_damaged_files=2)) is None
    assert not (tmp_path / "out.parts").exists()
    for changes, message in (({"allow_damaged_files": 0}, "than --allow-damaged-files 0, as its report .* line 5: the"),
                             ({"max_errors": 0}, "more tolerance than --max-errors 0, as its report says: .* line 1: "),
                             ({"on_error": "fail"}, "than --on-error fail: --max-errors 0, as its report says: ")):
        with pytest.raises(ValueError, match=message):
            run(settings_of(tmp_path, **{"overwrite": False, "allow_damaged_files": 1} | changes))


def test_the_output_is_no_input(tmp_path):
    """A directory of texts in which the output lies as well: a second start does not read the first one's files."""
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": "1"}] * 3 + [{}])
    both = {"input": (str(tmp_path),), "part_bytes": 20, "overwrite": False}
    with pytest.raises(ValueError, match="--max-errors 1: 2 documents cannot be used so far"):
        run(settings_of(tmp_path, max_errors=1, **both))
    report = run(settings_of(tmp_path, **both))
    assert report.documents == 9 and report.parts_reused > 2
    assert run(settings_of(tmp_path, **both)) is None and (tmp_path / "out_report.json").exists()
    with pytest.raises(ValueError, match="nothing but what this command writes itself"):
        run(settings_of(tmp_path, "out_report.json"))


@pytest.mark.parametrize("prefix", [".", "..", "", "data/", "data/."])
def test_a_directory_is_no_prefix(tmp_path, prefix):
    with pytest.raises(ValueError, match=f"--output-prefix {prefix}: that is a directory; give the beginning of"):
        settings_of(tmp_path, output_prefix=prefix)
    (tmp_path / "web").mkdir()
    settings_of(tmp_path, output_prefix=str(tmp_path / "web"))  # gives web_text_document.bin beside it


def test_the_columns_of_a_parquet_file_are_told(tmp_path):
    (tmp_path / "in.parquet").write_bytes(parquet())
    with pytest.raises(ValueError, match=r"row 1: no key 'content' \(--json-keys\); it has 'text', 'title'$"):
        run(settings_of(tmp_path, "in.parquet", json_keys=("content",), on_error="fail"))
    with pytest.raises(ValueError, match=r"no key 'text.body' \(--json-keys\); 'text' is no object but a str$"):
        run(settings_of(tmp_path, "in.parquet", json_keys=("text.body",), on_error="fail", discard_parts=True))
    write_lines(tmp_path / "in.jsonl", [{"meta": {"title": "1"}}])
    with pytest.raises(ValueError, match=r"no key 'meta.text' \(--json-keys\); 'meta' has 'title'$"):
        run(settings_of(tmp_path, json_keys=("meta.text",), on_error="fail", discard_parts=True))


def tool(folder, *arguments):
    command = [sys.executable, TOOL, "--tokenizer-type", "NullTokenizer", "--tokenizer-model", "1000",
               "--output-prefix", folder / "out", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_tool_ends_with_status_2_in_one_line(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 1000)[:-20])
    done = tool(tmp_path, "--input", path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"preprocess_data.py: error: {path} line ")
    done = tool(tmp_path, "--input", path, "--allow-damaged-files", "1")
    assert done.returncode == 0 and f"damaged: {path} line " in done.stdout
