"""Contenders for the lock on a --save directory whose steps fall between each other's in every drawn order: whoever has
it keeps it until it gives it up or is killed, and whatever the killed leave behind is in nobody's way.
"""

import json
import os
import random
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_deepseek.runtime import save_lock
from megatron_deepseek.runtime.save_lock import LOCK, Holder, SaveLock, read_holder

DEAD = replace(Holder.here("of a dead one"), started="1")


class Killed(BaseException):
    """No handler of ours catches it, as none catches SIGKILL; and what a `finally` would do is not done either."""


class Turns:
    """Threads that take turns, drawn at random, at every step that others can see; of some the lives end there."""

    def __init__(self, draw: random.Random, deaths: int):
        self.draw, self.deaths, self.killed = draw, deaths, set()
        self.living, self.waiting, self.turn, self.changed = [], [], None, threading.Condition()

    def play(self, *lives) -> None:
        self.living = [threading.Thread(target=self._live, args=(life,)) for life in lives]
        threads = list(self.living)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def _live(self, life) -> None:
        try:
            life()
        except Killed:
            pass
        with self.changed:
            self.living.remove(threading.current_thread())
            self._draw_turn()

    def step(self) -> None:
        """Wait until it is this thread's turn."""
        own = threading.current_thread()
        if own not in self.living:
            return  # the test's own
        with self.changed:
            self.waiting.append(own)
            self._draw_turn()
            assert self.changed.wait_for(lambda: self.turn is own, 60)
            self.turn = None
            if own not in self.killed and self.deaths and self.draw.random() < 0.05:
                self.deaths -= 1
                self.killed.add(own)
        if own in self.killed:
            raise Killed

    def _draw_turn(self) -> None:
        if self.turn is None and self.waiting and len(self.waiting) == len(self.living):
            self.turn = self.waiting.pop(self.draw.randrange(len(self.waiting)))
            self.changed.notify_all()

    def stepping(self, real):
        def call(*args, **kwargs):
            self.step()
            return real(*args, **kwargs)

        return call


class Contender:
    """Acquires the lock, keeps it for some steps, and may release it; `kept` is False once it was found another's."""

    def __init__(self, turns: Turns, root: Path, job: str):
        self.turns, self.kept, self.had, self.released, self.thread = turns, True, False, False, None
        self.lock = SaveLock(root, job, print, print, beat_seconds=600, leaving_seconds=0)
        self.releases = turns.draw.random() < 0.3

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        try:
            self.lock.acquire()
        except ValueError:
            return
        self.had = True
        for _ in range(12):
            self.kept &= read_holder(self.lock.path) == self.lock.me
            self.turns.step()
        if self.releases:
            self.lock.release()
            self.released = True

    @property
    def is_dead(self) -> bool:
        return self.thread in self.turns.killed

    @property
    def has_it(self) -> bool:
        return self.had and not self.released and not self.is_dead


def in_turns(patch, turns: Turns, contenders: list[Contender], *others) -> None:
    for owner, names in ((os, ("link", "rename", "utime")), (Path, ("unlink", "glob")),
                         (save_lock, ("write_synced", "read_holder"))):
        for name in names:
            patch.setattr(owner, name, turns.stepping(getattr(owner, name)))
    patch.setattr(Holder, "process_is_gone", lambda self: self == DEAD or any(
        each.lock.me == self and each.is_dead for each in contenders))
    turns.play(*contenders, *others)


def contend(monkeypatch, root: Path, seed: int, deaths: int) -> list[Contender]:
    root.mkdir()
    (root / LOCK).write_text(json.dumps(asdict(DEAD)))
    turns = Turns(random.Random(seed), deaths)
    contenders = [Contender(turns, root, str(number)) for number in range(3)]
    with monkeypatch.context() as patch:
        in_turns(patch, turns, contenders)
        assert all(each.kept for each in contenders), f"seed {seed}: one lost its lock"
        having = [each for each in contenders if each.has_it]
        assert len(having) <= 1, f"seed {seed}: two have it"
        late = SaveLock(root, "late", print, print, beat_seconds=600, leaving_seconds=0)
        if having:
            with pytest.raises(ValueError, match="in use"):
                late.acquire()
        else:
            late.acquire()
        late.release()
    for each in contenders:
        each.lock.released.set()
    return contenders


@pytest.mark.parametrize("deaths", [0, 2])
def test_who_has_it_keeps_it(monkeypatch, tmp_path, deaths):
    had, died = 0, 0
    for seed in range(60):
        contenders = contend(monkeypatch, tmp_path / str(seed), seed, deaths)
        had += sum(each.had for each in contenders)
        died += sum(each.is_dead for each in contenders)
        assert deaths or any(each.had for each in contenders), f"seed {seed}: nobody got it"
    assert had > 30 and (died > 20) == bool(deaths)


def test_an_earlier_life_gives_up_while_the_next_takes_over(tmp_path):
    """And another job comes between: what it gets is not taken for the earlier life's."""
    earlier, following, another = (SaveLock(tmp_path, job, print, print, beat_seconds=600, leaving_seconds=0)
                                   for job in ("job", "job", "another"))
    earlier.acquire()
    put_in_place, had = following.put_in_place, []

    def late(path):
        earlier.release()
        try:
            another.acquire()
            had.append(another)
        except ValueError:
            pass
        put_in_place(path)
        had.append(following)

    following.put_in_place = late
    following.acquire()
    assert had == [following] and read_holder(tmp_path / LOCK) == following.me
    for lock in (following, another):
        lock.release()
    assert not list(tmp_path.iterdir())


def test_a_start_that_is_refused_removes_the_directory_under_the_next(tmp_path):
    first, second = (SaveLock(tmp_path / "run", job, print, print, beat_seconds=600, leaving_seconds=0)
                     for job in ("a", "b"))
    first.acquire()
    make, endings = second._make, [first.release]

    def late(path):
        if endings:
            endings.pop()()
        return make(path)

    second._make = late
    second.acquire()
    assert read_holder(second.path) == second.me
    second.release()
