"""The lock on a --save directory: one job holds it, and what the dead left is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from megatron_deepseek.runtime import lock_holder, save_lock
from megatron_deepseek.runtime.save_lock import LOCK, Holder, SaveLock, read_holder


@pytest.fixture
def lock(tmp_path):
    """Makes locks of `tmp_path`/run that are quick; they are released at the end."""
    made = []

    def make(job: str = "job", **changes) -> SaveLock:
        made.append(SaveLock(tmp_path / "run", job, changes.pop("say", print), changes.pop("lost", print),
                             **{"beat_seconds": 0.02, "silence_seconds": 0.4, "leaving_seconds": 0.1, **changes}))
        return made[-1]

    yield make
    for each in made:
        each.release()


def leave(root, **changes) -> Holder:
    """A lock as a process would have left it that is gone."""
    holder = replace(Holder.here("another"), started="1", **changes)
    root.mkdir(exist_ok=True)
    (root / LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def test_the_second_is_told_of_the_first(lock, tmp_path):
    first, second = lock("a"), lock("b")
    first.acquire()
    with pytest.raises(ValueError) as refused:
        second.acquire()
    assert str(refused.value).startswith(f"--save {tmp_path}/run is in use by process {os.getpid()} on "
                                         f"{first.me.host} since {first.me.since}: ")
    first.release()
    assert not (tmp_path / "run").exists(), "what a refused start made is gone"
    second.acquire()


def test_of_many_at_once_one_gets_it(lock, tmp_path):
    """Also when all of them find a dead one's lock first."""
    leave(tmp_path / "run")
    contenders, results = [lock(str(number)) for number in range(8)], []
    ready = threading.Barrier(len(contenders))

    def contend(contender):
        ready.wait()
        try:
            contender.acquire()
            results.append(True)
        except ValueError:
            results.append(False)

    threads = [threading.Thread(target=contend, args=(each,)) for each in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]


def test_one_whose_files_are_swept_meanwhile_is_told_who_was_first(lock, tmp_path, monkeypatch):
    first, second = lock("a"), lock("b")
    first.acquire()

    def link_late(aside, path, link=os.link):
        try:
            link(aside, path)
        finally:
            aside.unlink()  # as first.acquire does last

    monkeypatch.setattr(os, "link", link_late)
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"):
        second.acquire()


def test_a_dead_process_of_this_host_holds_nothing(lock, tmp_path):
    """Killed, and a zombie until its parent asks; or gone, its number another process's."""
    program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = leave(tmp_path / "run", pid=program.pid)
    alive = replace(holder, started=lock_holder.process_start(program.pid))
    (tmp_path / "run" / LOCK).write_text(json.dumps(asdict(alive)))
    with pytest.raises(ValueError, match=f"process {program.pid} on"):
        lock().acquire()
    program.kill()
    os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)  # until it is a zombie, and it stays one
    lock().acquire()
    program.wait()
    for each in tmp_path.glob(f"run/{LOCK}"):
        each.unlink()
    leave(tmp_path / "run")  # this process's number, and another start
    lock().acquire()
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / LOCK]


def test_one_that_is_about_to_leave_is_waited_for(lock, tmp_path):
    program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    leave(tmp_path / "run", pid=program.pid)
    holder = replace(read_holder(tmp_path / "run" / LOCK), started=lock_holder.process_start(program.pid))
    (tmp_path / "run" / LOCK).write_text(json.dumps(asdict(holder)))
    threading.Timer(0.2, program.kill).start()
    lock(leaving_seconds=20).acquire()
    program.wait()


def test_another_life_of_the_same_job_gets_it_at_once(lock):
    """torchrun's restart, whatever host the lives were on: nobody waits, and the earlier one, if it lives, stops."""
    lost = []
    first = lock("same", lost=lost.append)
    first.acquire()
    second = lock("same", silence_seconds=600, leaving_seconds=600)
    second.acquire()
    first.keeper.join(10)
    assert lost == [second.me] and read_holder(second.path) == second.me


def test_another_hosts_lock_is_taken_once_it_is_silent(lock, tmp_path):
    """By its own changes: whether the other's clock is years ahead or behind means nothing."""
    said = []
    leave(tmp_path / "run", host="elsewhere", place="another boot")
    os.utime(tmp_path / "run" / LOCK, (9e9, 9e9))
    begun = time.monotonic()
    lock(say=said.append).acquire()
    assert time.monotonic() - begun >= 0.4
    assert "held by process" in said[0] and "on elsewhere since" in said[0] and "waiting 0.4 s" in said[0]


def test_another_hosts_lock_that_beats_is_respected(lock, tmp_path):
    """A live holder elsewhere: here the same process under another place."""
    first = lock("a")
    first.me = replace(first.me, place="another boot", host="elsewhere")
    first.acquire()
    os.utime(first.path, (1e9, 1e9))
    with pytest.raises(ValueError, match="in use by process .* on elsewhere"):
        lock("b", silence_seconds=60).acquire()


def test_without_hard_links(lock, monkeypatch):
    def no_links(*_):
        raise PermissionError(save_lock.errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    lock("a").acquire()
    with pytest.raises(ValueError, match="in use"):
        lock("b").acquire()


def test_a_damaged_lock_is_taken_once_it_is_silent(lock, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text('{"token": 5')
    lock().acquire()


def test_a_removed_directory_is_locked_again(lock, tmp_path):
    held = lock()
    held.acquire()
    held.path.unlink()
    (tmp_path / "run").rmdir()
    assert save_lock.becomes_true(20, lambda: (read_holder(held.path) or Holder("")).token == held.me.token)


def test_a_lock_that_was_damaged_is_written_again(lock, tmp_path):
    """By its holder, which lives, even on a full disk: nobody may take it for a dead one's."""
    held = lock(lost=None)
    held.acquire()
    held.path.write_text('{"token": 5')
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
        lock("b", silence_seconds=20).acquire()
    assert list((tmp_path / "run").iterdir()) == [held.path] and read_holder(held.path) == held.me


def test_a_damaged_lock_shows_life_on_a_full_disk(lock, monkeypatch):
    def full(path, _):
        raise OSError(save_lock.errno.ENOSPC, "No space left on device", str(path))

    held = lock()
    held.acquire()
    held.path.write_text("")
    monkeypatch.setattr(save_lock, "write_synced", full)
    os.utime(held.path, (1e9, 1e9))
    assert save_lock.becomes_true(20, lambda: held.path.stat().st_mtime > 2e9 - 1e9 + 1)
    monkeypatch.undo()


def test_releasing_leaves_anothers_lock_alone(lock, tmp_path):
    held = lock(beat_seconds=60)
    held.acquire()
    other = leave(tmp_path / "run")
    held.release()
    assert read_holder(tmp_path / "run" / LOCK) == other
