"""A run killed at any step of publishing a checkpoint leaves a whole one behind, and the next save cleans up."""

import errno
import os
import shutil

import pytest

from megatron_deepseek.checkpoint import tracker, publishing as publish
from megatron_deepseek.checkpoint.tracker import (
    TRACKER,
    begins_anew,
    find_iteration,
    iteration_directory,
    iterations,
    last_iteration,
    leftover_notes,
    leftovers,
    next_tracker,
    problem,
)

MUTATIONS = ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"))


class Killed(BaseException):
    """No handler of ours catches it, as none catches SIGKILL."""


class Reaper:
    """Ends the process, so to speak, instead of its `after`-th change of the file system; then nothing else happens."""

    def __init__(self, monkeypatch, after: int):
        self.left = after
        for module, name in MUTATIONS:
            monkeypatch.setattr(module, name, self._dying(getattr(module, name)))

    def _dying(self, real):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return real(*args, **kwargs)

        return call


def save(root, iteration, content, keep_last=None):
    directory = publish.begin(root, iteration)
    (directory / "data").write_text(content)
    return publish.publish(root, iteration, keep_last)


def content(root) -> str | None:
    """What loading would find."""
    iteration = last_iteration(root)
    return None if iteration is None else (find_iteration(root, iteration) / "data").read_text()


def killed_everywhere(monkeypatch, root, prepare, action, check):
    """Runs `action` on a fresh `root`, killed before its first, second, ... change, until it survives."""
    for after in range(100):
        shutil.rmtree(root, ignore_errors=True)
        prepare()
        with monkeypatch.context() as patch:
            Reaper(patch, after)
            try:
                action()
                break
            except Killed:
                pass
        check()
        save(root, 900, "next")  # and life goes on
        assert content(root) == "next" and not leftovers(root) and not next_tracker(root).exists()
        assert not list(root.glob(f"*{tracker.REPLACED}"))
    assert after > 5
    check()


def test_killed_while_saving_the_next(monkeypatch, tmp_path):
    root = tmp_path / "run"

    def check():
        assert content(root) in ("old", "new") and problem(root) is None
        assert all((find_iteration(root, step) / "data").exists() for step in iterations(root))

    killed_everywhere(monkeypatch, root, lambda: save(root, 100, "old"), lambda: save(root, 200, "new"), check)
    assert content(root) == "new"


def test_killed_while_saving_the_first(monkeypatch, tmp_path):
    """Either nothing was there yet and the run begins anew, or the checkpoint is found."""
    root = tmp_path / "run"

    def check():
        assert content(root) == "new" or (content(root) is None and begins_anew(root))

    killed_everywhere(monkeypatch, root, lambda: None, lambda: save(root, 100, "new"), check)
    assert content(root) == "new"


@pytest.mark.parametrize("named", [100, 200])
def test_killed_while_saving_an_iteration_again(monkeypatch, tmp_path, named):
    """After going back to 100 the old 200 stays until the new one is whole, whichever the tracker names."""
    root = tmp_path / "run"

    def prepare():
        save(root, 100, "first")
        save(root, 200, "old")
        (root / TRACKER).write_text(f"{named}\n")

    def check():
        assert content(root) in ("first" if named == 100 else "old", "new")
        assert (find_iteration(root, 200) / "data").read_text() in ("old", "new")

    killed_everywhere(monkeypatch, root, prepare, lambda: save(root, 200, "new"), check)
    assert content(root) == "new"


def test_killed_while_removing_old_ones(monkeypatch, tmp_path):
    root = tmp_path / "run"

    def prepare():
        for iteration in (100, 200, 300):
            save(root, iteration, str(iteration))

    def check():
        assert content(root) in ("300", "new") and problem(root) is None
        assert all((find_iteration(root, step) / "data").exists() for step in iterations(root))

    killed_everywhere(monkeypatch, root, prepare, lambda: save(root, 400, "new", keep_last=2), check)
    assert iterations(root) == [300, 400]


def test_keep_last_keeps_what_the_marker_names(tmp_path):
    """A run that went back from 300 to 100 and saved 150 keeps 150, though 200 and 300 have higher numbers."""
    for iteration in (100, 200, 300):
        save(tmp_path, iteration, "x")
    save(tmp_path, 150, "x", keep_last=2)
    assert iterations(tmp_path) == [150, 200, 300] and last_iteration(tmp_path) == 150


def test_what_cannot_be_removed_costs_no_checkpoint(tmp_path, monkeypatch):
    """As on NFS, while somebody reads a file of a checkpoint that --keep-last removes: it is told, and tried again."""
    def busy(path, *_, **__):
        (path / "data").unlink()
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    save(tmp_path, 100, "x")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for iteration in (200, 300):
            save(tmp_path, iteration, str(iteration), keep_last=1)
            assert content(tmp_path) == str(iteration) and iterations(tmp_path) == [iteration]
    assert [note.split(":")[0] for note in leftover_notes(tmp_path)] == [
        f"{tmp_path}/iter_0000{iteration}.removing is half removed" for iteration in (100, 200)]
    save(tmp_path, 400, "400")
    assert leftovers(tmp_path) == [] and iterations(tmp_path) == [300, 400]


@pytest.mark.parametrize("there, words", [
    (100, "but loading takes {root}/iter_0000100 unless --ckpt-step is given"),
    (None, "and is what loading takes"), (200, "and is what loading takes")])
def test_a_marker_that_cannot_be_replaced(tmp_path, monkeypatch, there, words):
    """The new one is whole by then: the error says so, and what loading would take, and that is what it takes."""
    if there is not None:
        save(tmp_path, there, "old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(publish.TrackerNotReplaced) as failed:
            save(tmp_path, 200, "new")
    assert failed.value.strerror == (f"No space left on device; {tmp_path}/iter_0000200 is whole, "
                                     + words.format(root=tmp_path))
    assert failed.value.filename == str(tmp_path / TRACKER) and failed.value.errno == errno.ENOSPC
    assert content(tmp_path) == ("old" if there == 100 else "new")
    assert (find_iteration(tmp_path, 200) / "data").read_text() == "new"
    save(tmp_path, 200, "again")
    assert content(tmp_path) == "again" and not next_tracker(tmp_path).exists() and not leftovers(tmp_path)


def test_a_marker_that_was_damaged_and_cannot_be_replaced(tmp_path, monkeypatch):
    save(tmp_path, 100, "old")
    (tmp_path / TRACKER).write_text("?")
    monkeypatch.setattr(os, "replace", lambda *_: os.rename(tmp_path / "nothing", tmp_path / "something"))
    with pytest.raises(publish.TrackerNotReplaced, match="iter_0000200 is whole, but --ckpt-step must say so"):
        save(tmp_path, 200, "new")
    assert problem(tmp_path) is not None and problem(tmp_path, 200) is None


def test_what_cannot_be_tidied_up_fails_no_save(tmp_path, monkeypatch):
    """The tracker names the new one by then."""
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    save(tmp_path, 100, "old")
    for name in ("_keep_newest", "settle"):
        with monkeypatch.context() as patch:
            directory = publish.begin(tmp_path, 200)
            (directory / "data").write_text("new")
            patch.setattr(publish, name, refuse)
            publish.publish(tmp_path, 200, keep_last=1)
        assert content(tmp_path) == "new"


def test_half_of_a_replaced_one_is_no_checkpoint(tmp_path, monkeypatch):
    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    save(tmp_path, 100, "old")
    monkeypatch.setattr(shutil, "rmtree", busy)
    save(tmp_path, 100, "new")
    assert content(tmp_path) == "new" and [path.name for path in leftovers(tmp_path)] == ["iter_0000100.removing"]
    shutil.move(tmp_path / "iter_0000100", tmp_path / "elsewhere")
    assert iterations(tmp_path) == []


def test_torn_directories_are_named_and_never_loaded(tmp_path):
    save(tmp_path, 100, "whole")
    publish.begin(tmp_path, 200)
    assert last_iteration(tmp_path) == 100 and iterations(tmp_path) == [100]
    [note] = leftover_notes(tmp_path)
    assert "iter_0000200.saving" in note and "never finished" in note


@pytest.mark.parametrize("text, says", [(None, "is missing"), ("many", "'many' is not a number"),
                                        ("", "is not a number"), ("300", "names iteration 300, which is not there")])
def test_a_lost_marker_is_an_error_that_says_what_to_do(tmp_path, text, says):
    save(tmp_path, 100, "x")
    save(tmp_path, 200, "x")
    (tmp_path / TRACKER).unlink()
    if text is not None:
        (tmp_path / TRACKER).write_text(text)
    assert last_iteration(tmp_path) is None and not begins_anew(tmp_path)
    assert says in problem(tmp_path) and "iterations 100, 200" in problem(tmp_path)
    assert "--ckpt-step 200" in problem(tmp_path)
    assert problem(tmp_path, step=100) is None
    assert problem(tmp_path, step=150) == "it has no finished checkpoint of iteration 150; it has iterations 100, 200"


def test_nothing_there(tmp_path):
    assert begins_anew(tmp_path / "nowhere") and "no such directory" in problem(tmp_path / "nowhere")
    assert "no finished checkpoint" in problem(tmp_path)
    (tmp_path / "config.json").touch()
    assert "neither *.safetensors nor a finished checkpoint" in problem(tmp_path)
    assert iteration_directory(tmp_path, 12).name == "iter_0000012"
