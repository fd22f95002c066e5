"""Results on disk by number: found again, of other digests passed over, torn ones cut off."""

import pytest

from megatron_deepseek.runtime.kept_records import KeptRecords, digest_of


def opened(path, digests, told=None) -> KeptRecords:
    return KeptRecords(path, digests, (told if told is not None else []).append)


@pytest.fixture
def path(tmp_path):
    kept = opened(tmp_path / "folder" / "kept.jsonl", {1: "a", 2: "b", 3: "c"})
    for number in (3, 1):
        kept.keep(number, {"value": number, "text": "ä\n\ud7ff"})
    kept.close()
    return tmp_path / "folder" / "kept.jsonl"


def test_what_was_kept_is_found_again(path):
    kept = opened(path, {1: "a", 2: "b", 3: "c"})
    assert [number in kept for number in (1, 2, 3)] == [True, False, True] and len(kept) == 2
    assert kept[1] == {"number": 1, "digest": "a", "value": 1, "text": "ä\n\ud7ff"}
    kept.keep(2, {"value": 22})
    kept.keep(1, {"value": 11})
    assert [kept[number]["value"] for number in (1, 2, 3)] == [11, 22, 3]
    kept.close()
    again = opened(path, {1: "a", 2: "b"})
    assert (again[1]["value"], again[2]["value"]) == (11, 22)


def test_results_of_something_else_are_passed_over(path):
    kept = opened(path, {1: "other", 3: "c"})
    assert 1 not in kept and 3 in kept
    kept.keep(1, {"value": "new"})
    kept.close()
    assert opened(path, {1: "other"})[1]["value"] == "new"
    assert opened(path, {1: "a"})[1]["value"] == 1


@pytest.mark.parametrize("lost", [1, 2, 30])
def test_a_torn_line_is_cut_off(path, lost):
    """And what is written next begins a line."""
    path.write_bytes(path.read_bytes()[:-lost])
    kept = opened(path, {1: "a", 3: "c"})
    assert 1 not in kept and kept[3]["value"] == 3
    kept.keep(1, {"value": "again"})
    kept.close()
    again = opened(path, {1: "a", 3: "c"})
    assert again[1]["value"] == "again" and len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", ["[1]\n", '{"number": 1}\n', "no JSON\n"])
def test_another_file_is_not_touched(tmp_path, line):
    (tmp_path / "kept.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"kept.jsonl, line 1 is "):
        opened(tmp_path / "kept.jsonl", {})
    assert (tmp_path / "kept.jsonl").read_text() == line


def test_digests_tell_apart():
    assert digest_of(1, "a") == digest_of(1, "a") != digest_of("1", "a")
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
