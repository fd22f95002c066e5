"""Ranks that make a directory together, of which one comes late: to the files of an earlier start, too."""

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_deepseek.checkpoint.building import DirectoryBuild, Share, build_directory
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.workspace import Workspace


@dataclass(frozen=True)
class File:
    name: str
    nbytes: int = 4


class Killed(BaseException):
    pass


def product_of(root: Path, **changes) -> DirectoryBuild:
    def write(path, file, advance) -> Fingerprint:
        path.write_text(file.name)
        return Fingerprint(path.stat().st_size, [])

    return DirectoryBuild("test", root / "made", [File("zero"), File("one")], [], [], write, lambda *given: None,
                   **changes)


def produce_together(build: DirectoryBuild, run: str, late: int | None = None) -> list[threading.Thread]:
    """On two ranks, of which `late` comes 0.2 s after the other; those that have not ended in ten seconds."""
    def work(rank: int) -> None:
        if rank == late:
            time.sleep(0.2)
        try:
            build_directory(build, Share(1, rank, 2, run), lambda nbytes: None, lambda text: None)
        except Killed:
            pass

    ranks = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(10)
    return [rank for rank in ranks if rank.is_alive()]


def killed(*_) -> None:
    raise Killed


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("moment", ["before the rename", "after it", "while the rest is removed"])
def test_a_rank_that_comes_late_after_a_kill(monkeypatch, tmp_path, moment, late):
    """The earlier start's ranks had all said that they were done."""
    build = product_of(tmp_path)
    with monkeypatch.context() as patch:
        if moment == "before the rename":
            patch.setattr(Workspace, "publish", killed)
        else:
            patch.setattr(Workspace, "remove", killed)
        assert not produce_together(build, "first")
    if moment == "while the rest is removed":
        shutil.rmtree(tmp_path / "made.incomplete" / "finished")
    assert not produce_together(build, "second", late)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    assert {path.name: path.read_text() for path in (tmp_path / "made").iterdir()} == {"zero": "zero", "one": "one"}
