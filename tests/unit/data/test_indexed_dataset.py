"""tools/indexed_dataset.py: figures worked by hand, each kind of damage by file and position, exit statuses, parts."""

import json
import os
import re

import numpy as np
import pytest

from megatron_deepseek.cli.indexed_dataset import main
from megatron_deepseek.data import index_file, inspection
from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.indexed import IndexedWriter, open_indexed

DOCUMENTS = [[5], [], [1, 2], [9], [4, 0]]  # lengths of sequences; ids count up from 0


@pytest.fixture
def prefix(tmp_path):
    writer = IndexedWriter(str(tmp_path / "data"), "<u2")
    writer.add(np.arange(21, dtype="<u2"), DOCUMENTS)
    writer.finish()
    writer.publish()
    return str(tmp_path / "data")


def put(path, at, value, dtype):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.array(value, dtype).tobytes())


def test_inspect_worked_by_hand(prefix, capsys):
    assert main(["inspect", "--json", prefix + ".idx"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 5 and figures["empty_documents"] == 1 and figures["sequences"] == 6
    assert figures["tokens"] == 21 and figures["shortest"] == 0 and figures["longest"] == 9
    assert figures["dtype"] == "uint16" and figures["bin_bytes"] == 42
    assert [tuple(entry.values()) for entry in figures["histogram"]] == [
        (0, 0, 1, 0), (1, 1, 0, 0), (2, 3, 1, 3), (4, 7, 2, 9), (8, 15, 1, 9)]
    assert main(["inspect", prefix]) == 0
    assert "5 documents (1 empty), 6 sequences, 21 tokens" in capsys.readouterr().out


def test_chunks_change_no_figure(prefix, capsys, monkeypatch):
    assert main(["inspect", "--json", prefix]) == 0
    monkeypatch.setattr(index_file, "ENTRIES_PER_CHUNK", 2)
    monkeypatch.setattr(inspection, "TOKENS_PER_CHUNK", 4)
    assert main(["inspect", "--json", prefix]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert main(["verify", prefix, "--vocab-size", "20"]) == 2
    assert "data.bin: token 20 (document 4, its token 3) is outside --vocab-size 20: 20" in capsys.readouterr().out


def test_a_sound_dataset(prefix, capsys):
    assert main(["verify", os.path.dirname(prefix), "--vocab-size", "21"]) == 0
    assert "sound; 5 documents, 6 sequences, ids from 0 to 20" in capsys.readouterr().out


HUGE = 2**63 - 8  # plus the bytes of a sequence: past int64
DAMAGE = {  # (section, place, value): what verify says, whether training refuses to read
    ("lengths", 2, -1): ("sequence 2 has the length -1", "negative lengths"),
    ("lengths", 3, 99): (r"sequence 3 is at bytes 16 to 214, outside the 42 bytes of .*data.bin", "points at 214"),
    ("pointers", 3, HUGE): (f"sequence 3 is at bytes {HUGE} to {HUGE + 18}, outside", f"points at {HUGE + 18}"),
    ("pointers", 3, -4): ("sequence 3 is at bytes -4 to 14, outside", "negative lengths or offsets"),
    ("pointers", 3, 14): ("sequence 3 begins at byte 14, and the one before it ends at 16", None),
    ("lengths", 5, 1): ("sequence 5 is at bytes 42 to 44, outside", "points at 44"),
    ("lengths", 4, 3): ("sequence 5 begins at byte 42, and the one before it ends at 40", None),
    ("documents", 0, 1): ("the first document begins at sequence 1, not at 0", "its documents are the sequences 1 to"),
    ("documents", 3, 0): ("entry 3 of the document index is 0, which is not between the one before, 1, and", None),
    ("documents", 3, 7): ("entry 3 of the document index is 7, which is not between", None),
    ("documents", 5, 5): ("the last document ends at sequence 5, but there are 6", "the sequences 0 to 5, but there"),
}


@pytest.mark.parametrize("entry", DAMAGE)
@pytest.mark.parametrize("chunk", [2, 1 << 18])
def test_verify_names_file_and_position(prefix, entry, chunk, capsys, monkeypatch):
    monkeypatch.setattr(index_file, "ENTRIES_PER_CHUNK", chunk)
    name, place, value = entry
    said, refused = DAMAGE[entry]
    section = getattr(open_index(prefix, ""), name)
    put(prefix + ".idx", section.offset + place * section.dtype.itemsize, value, section.dtype)
    assert main(["verify", prefix]) == 2
    out = capsys.readouterr().out
    assert re.search(r"data\.idx: " + said, out), out
    for command in (["inspect", prefix], ["merge", prefix, "--output-prefix", prefix + "_out"],
                    ["split", prefix, "--parts", "2", "--output-prefix", prefix + "_out"]):
        assert main(command) == 2
    assert "data.idx" in capsys.readouterr().err
    assert sorted(os.listdir(os.path.dirname(prefix))) == ["data.bin", "data.idx"]
    if refused is None:
        open_indexed(prefix, "--data-path")
    else:
        with pytest.raises(ValueError, match=refused):
            open_indexed(prefix, "--data-path")


def test_damage_of_whole_files(prefix, capsys):
    with open(prefix + ".bin", "ab") as file:
        file.write(b"\0")
    assert main(["verify", prefix]) == 2
    assert "data.bin holds 43 bytes, but its last sequence in" in capsys.readouterr().out
    put(prefix + ".idx", 26, 0, "<u8")
    assert main(["verify", prefix]) == 2
    assert "data.idx is damaged" in capsys.readouterr().out
    with open(prefix + ".idx", "r+b") as file:
        file.truncate(34 + 12 * 6)
    assert main(["verify", prefix]) == 2
    assert "its document index is empty" in capsys.readouterr().out


def test_verify_stops_where_asked(prefix, capsys):
    assert main(["verify", prefix, "--vocab-size", "2", "--most", "3"]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 4


def documents_of(prefix):
    """(lengths, ids) of each document, read by megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    dataset = IndexedDataset(prefix)
    bounds = zip(dataset.document_indices[:-1], dataset.document_indices[1:])
    return [([len(dataset[i]) for i in range(first, end)], [int(x) for i in range(first, end) for x in dataset[i]])
            for first, end in bounds]


@pytest.mark.parametrize("how, shares", [(["--parts", "2"], [2, 3]), (["--weights", "3", "1", "1"], [3, 1, 1])])
def test_parts_hold_the_documents_in_order(prefix, how, shares, capsys):
    assert main(["split", prefix, *how, "--output-prefix", prefix + "_part"]) == 0
    parts = [documents_of(f"{prefix}_part_{part}") for part in range(len(shares))]
    assert [len(part) for part in parts] == shares and sum(parts, []) == documents_of(prefix)
    merged = [f"{prefix}_part_{part}" for part in range(len(shares))]
    assert main(["merge", *merged, "--output-prefix", prefix + "_again"]) == 0
    for suffix in (".bin", ".idx"):
        assert open(prefix + "_again" + suffix, "rb").read() == open(prefix + suffix, "rb").read()


def test_head(prefix, capsys):
    assert main(["head", prefix, "-n", "2", "--start", "2", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "--- document 2: 3 tokens in 2 sequences:", "5 6 7",
        "--- document 3: 9 tokens in 1 sequences, the first 4:", "8 9 10 11"]


def test_head_as_text(tmp_path, capsys):
    writer = IndexedWriter(str(tmp_path / "text"), "<u2")
    text = "Größe: 12 m²"
    writer.add(np.array([*text.encode(), 257], "<u2"), [[len(text.encode()) + 1]])
    writer.finish()
    writer.publish()
    assert main(["head", str(tmp_path / "text"), "--tokenizer-type", "ByteTokenizer"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == text + "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("arguments, message", [
    (["split", "{}", "--parts", "9", "--output-prefix", "{}_x"], "part 1 of 9 would get none"),
    (["split", "{}", "--weights", "1", "-1", "--output-prefix", "{}_x"], "weights 1 -1: all must be greater than 0"),
    (["split", "{}", "--parts", "0", "--output-prefix", "{}_x"], "--parts 0: it must be at least 1"),
    (["head", "{}", "--start", "5"], "--start 5: .*data has 5 documents"),
    (["verify", "{}", "--vocab-size", "0"], "--vocab-size 0 must be at least 1"),
    (["inspect", "{}.bin"], "give the prefix, without .bin or .idx"),
    (["merge", "/", "--output-prefix", "{}_x"], "/ holds no .idx"),
])
def test_mistakes_are_one_line_and_status_2(prefix, arguments, message, capsys):
    assert main([argument.format(prefix) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
