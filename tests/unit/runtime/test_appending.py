"""A file that a run appends to, through a full disk, its errors, and its removal: no byte lost, torn or double."""

import errno
import os
import shutil

import pytest

from megatron_deepseek.runtime.appending import AppendedFile


class Disk:
    """In the place of os.write: takes `room` bytes more, then raises `error`."""

    def __init__(self, monkeypatch):
        self.room, self.error, self.write = 10**9, errno.ENOSPC, os.write
        monkeypatch.setattr("megatron_deepseek.runtime.appending.os.write", self)

    def __call__(self, descriptor: int, data) -> int:
        if not self.room:
            raise OSError(self.error, os.strerror(self.error))
        written = self.write(descriptor, bytes(data[:self.room]))
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("room", [0, 3])
def test_a_disk_that_refuses_for_a_while(disk, tmp_path, error, room):
    """Also in the middle of a record: it is completed later, and what came meanwhile follows."""
    told, path = [], tmp_path / "file"
    file = AppendedFile(path, told.append)
    file.write(b"first\n")
    disk.room, disk.error = room, error
    file.write(b"second\n")
    file.write(b"third\n")
    assert path.read_bytes() == b"first\nsecond\n"[:6 + room]
    assert told == [f"{path} cannot be written: {os.strerror(error)}. Training goes on; what belongs there is kept, "
                    "and written once it can be"]
    disk.room = 10**9
    file.write(b"fourth\n")
    file.close()
    assert path.read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert told[1:] == [f"{path} is written again, and nothing is missing"]


def test_what_still_waits_at_the_end_is_an_error(disk, tmp_path):
    file = AppendedFile(tmp_path / "file", print)
    disk.room = 0
    file.write(b"123456\n")
    with pytest.raises(OSError, match="the last 7 bytes are missing"):
        file.close()


def test_its_end_is_another_attempt(disk, tmp_path):
    file = AppendedFile(tmp_path / "file", lambda line: None)
    disk.room = 0
    file.write(b"123456\n")
    disk.room = 10
    file.close()
    assert (tmp_path / "file").read_bytes() == b"123456\n"


@pytest.mark.parametrize("remove", [lambda path: shutil.rmtree(path.parent), os.unlink], ids=["directory", "file"])
def test_what_is_removed_is_made_again_as_it_was(tmp_path, remove):
    told, path = [], tmp_path / "run" / "file"
    path.parent.mkdir()
    path.write_bytes(b"x" * (3 << 20) + b"\n")  # from an earlier start
    file = AppendedFile(path, told.append)
    file.write(b"first\n")
    remove(path)
    file.write(b"second\n")
    file.write(b"third\n")
    file.close()
    assert path.read_bytes() == b"x" * (3 << 20) + b"\nfirst\nsecond\nthird\n"
    assert told == [f"{path} was removed while the run wrote it, and is made again"]
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_removed_directory_that_cannot_be_made_yet(disk, tmp_path):
    path = tmp_path / "run" / "file"
    path.parent.mkdir()
    told = []
    file = AppendedFile(path, told.append)
    file.write(b"first\n")
    shutil.rmtree(path.parent)
    path.parent.write_text("in the way")
    file.write(b"second\n")
    assert len(told) == 1 and "cannot be written" in told[0]
    path.parent.unlink()
    disk.room = 2
    file.write(b"third\n")
    assert not path.exists()
    disk.room = 100
    file.write(b"fourth\n")
    file.close()
    assert path.read_bytes() == b"first\nsecond\nthird\nfourth\n"


def test_another_file_of_that_name_is_kept(tmp_path):
    """As after an editor has saved it."""
    path = tmp_path / "file"
    file = AppendedFile(path, print)
    file.write(b"first\n")
    (tmp_path / "edited").write_bytes(b"edited\n")
    os.replace(tmp_path / "edited", path)
    file.write(b"second\n")
    file.close()
    assert path.read_bytes() == b"edited\nsecond\n"


def stale_once(monkeypatch, name: str, times: int = 1) -> None:
    """The first calls of os.`name` fail as on a file that the NFS server does not know any more."""
    real, left = getattr(os, name), [None] * times

    def call(*args):
        if left:
            left.pop()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*args)

    monkeypatch.setattr(f"megatron_deepseek.runtime.appending.os.{name}", call)


@pytest.mark.parametrize("call", ["write", "fstat"])
def test_a_stale_file_handle_is_opened_anew(monkeypatch, tmp_path, call):
    told, path = [], tmp_path / "file"
    file = AppendedFile(path, told.append)
    file.write(b"first\n")
    stale_once(monkeypatch, call)
    file.write(b"second\n")
    file.close()
    assert path.read_bytes() == b"first\nsecond\n" and told == []


def test_a_handle_that_stays_stale_is_told(monkeypatch, tmp_path):
    told, path = [], tmp_path / "file"
    file = AppendedFile(path, told.append)
    stale_once(monkeypatch, "write", 2)
    file.write(b"first\n")
    assert path.read_bytes() == b"" and "Stale file handle" in told[0]
    file.write(b"second\n")
    file.close()
    assert path.read_bytes() == b"first\nsecond\n" and told[1:] == [f"{path} is written again, and nothing is missing"]
