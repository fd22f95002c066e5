"""Checksums of a checkpoint directory: every kind of damage is found and named, nothing else is."""

import json
import re

import pytest
import xxhash

from megatron_deepseek.checkpoint.integrity import (
    CHECKSUMS,
    Checksum,
    RunningChecksum,
    check_sizes,
    checksum_directory,
    checksum_file,
    read_checksums,
    verify_directory,
)

SIZES = {"empty": 0, "small": 100, "large": (1 << 22) + 7, "sub/inner": 12}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(bytes(index % 251 for index in range(size)))
    checksum_directory(tmp_path)
    return tmp_path


def kinds(directory) -> dict[str, str]:
    return {damage.file: damage.kind for damage in verify_directory(directory, workers=2)}


def test_format_is_what_other_tools_compute(directory):
    """Against the library's one-shot function."""
    listing = json.loads((directory / CHECKSUMS).read_text())
    assert listing["algorithm"] == "xxh3_128" and set(listing["files"]) == set(SIZES)
    for name, entry in listing["files"].items():
        data = (directory / name).read_bytes()
        assert entry == {"bytes": len(data), "digest": xxhash.xxh3_128_hexdigest(data)}


def test_running_checksum_in_pieces_is_that_of_the_file(directory):
    running, data = RunningChecksum(), (directory / "large").read_bytes()
    for start in range(0, len(data), 999_983):
        running.update(data[start:start + 999_983])
    seen = []
    assert running.result() == checksum_file(directory / "large", seen.append)
    assert sum(seen) == len(data)


def test_intact_directory_has_no_damage(directory):
    assert verify_directory(directory) == []
    assert check_sizes(directory, read_checksums(directory)) == []


def test_each_kind_of_damage_is_named(directory):
    data = bytearray((directory / "large").read_bytes())
    data[-1] ^= 1  # one bit of the last byte
    (directory / "large").write_bytes(data)
    (directory / "small").write_bytes(b"x" * 99)
    (directory / "empty").write_bytes(b"y")
    (directory / "sub" / "inner").unlink()
    (directory / "more").touch()
    expected = {"empty": "longer", "large": "changed", "more": "unlisted", "small": "truncated", "sub/inner": "missing"}
    assert kinds(directory) == expected
    by_size = {damage.file: damage.kind for damage in check_sizes(directory, read_checksums(directory))}
    assert by_size == {name: kind for name, kind in expected.items() if kind not in ("changed", "unlisted")}
    assert "small is truncated: 99 of 100 bytes" in map(str, verify_directory(directory))


def test_a_file_that_cannot_be_looked_at_is_damage(directory):
    """And no error of one rank, while the others wait for what it has found."""
    (directory / "sub" / "inner").unlink()
    (directory / "sub").rmdir()
    (directory / "sub").write_bytes(b"")
    [found] = check_sizes(directory, read_checksums(directory))
    assert str(found) == "sub/inner cannot be read: Not a directory"
    assert kinds(directory) == {"sub": "unlisted", "sub/inner": "unreadable"}


def test_known_files_are_not_read_again(directory):
    listing = read_checksums(directory)
    checksum_directory(directory, {"small": Checksum(100, "from its writer")})
    assert read_checksums(directory)["small"].digest == "from its writer"
    assert read_checksums(directory)["large"] == listing["large"]


def test_a_known_file_that_is_lost_stays_listed(directory):
    (directory / "small").unlink()
    checksum_directory(directory, {"small": Checksum(100, "from its writer")})
    assert kinds(directory) == {"small": "missing"}


def test_without_a_listing_nothing_is_said(tmp_path):
    assert verify_directory(tmp_path) is None


@pytest.mark.parametrize("text, said", [
    ("", "is malformed JSON"), ("{}", 'has no "algorithm"'), ("[]", "holds a list of 0, not an object"),
    ('{"algorithm": "crc32", "files": {}}', '"algorithm" is "crc32", not xxh3_128'),
    ('{"algorithm": "xxh3_128"}', 'has no "files"'), ("[" * 100_000, "nested more than 128 deep"),
    ('{"algorithm": "xxh3_128", "files": {"small": 5}}', 'in "files": "small" is 5, not an object'),
    ('{"algorithm": "xxh3_128", "files": {"small": {"bytes": 1.5, "digest": ""}}}', '"bytes" is 1.5, not an integer'),
    ('{"algorithm": "xxh3_128", "files": {"../a": {"bytes": 0, "digest": ""}}}', "'../a' is not the name of a file in"),
    ('{"algorithm": "xxh3_128", "files": {"/dev/zero": {"bytes": 0, "digest": ""}}}', "'/dev/zero' is not the name of"),
    ('{"algorithm": "xxh3_128", "files": {"a\\nb": {"bytes": 0, "digest": ""}}}', "'a\\nb' is not the name of a file"),
])
def test_a_damaged_listing_is_an_error(directory, text, said):
    (directory / CHECKSUMS).write_text(text)
    with pytest.raises(ValueError, match=f"{CHECKSUMS}.* {re.escape(said)}") as caught:
        verify_directory(directory)
    assert "\n" not in str(caught.value)
