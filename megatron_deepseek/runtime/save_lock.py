"""One job at a time writes to a --save directory: run.lock says which one, and a dead one's lock is taken over.

The lock is a file that gets its name by link, which is atomic on network file systems too, where flock may mean
nothing. Who holds it is dead if

    its process was on this host       and is gone, or its number belongs to a process that started at another time
    it was an earlier life of this job  torchrun starts ranks anew once all of them have ended
    it was elsewhere                   and the lock's time of change, which the holder renews every BEAT_SECONDS, stays
                                       the same for SILENCE_SECONDS. It is compared with itself alone, so the clocks of
                                       two machines need not agree

Several may find the same one dead. Only who holds the right to its place, a file named after the dead one and
got like the lock itself, puts its own name there, by one rename: so the lock of a holder that lives is never moved, and
at no moment does it name nobody. A holder that ends gives its lock up under the same right.

A holder that finds another one's name in its lock (it was suspended, or cut off) must stop at once: two would write.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_deepseek.checkpoint.publishing import write_synced
from megatron_deepseek.runtime.lock_holder import LOCK, Holder, read_holder

BEAT_SECONDS, SILENCE_SECONDS = 10.0, 60.0
LEAVING_SECONDS = 5.0  # ranks whose agent was killed notice it within a second or two, and end
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class SaveLock:
    """Held from `acquire` to `release`. `lost` is called, in a thread, with the new holder if it becomes another's.

    Neither kills nor exceptions release it: what still writes in the background ends with the process.
    """

    def __init__(self, root: Path, job: str, say: Callable[[str], None], lost: Callable[[Holder], None],
                 beat_seconds: float = BEAT_SECONDS, silence_seconds: float = SILENCE_SECONDS,
                 leaving_seconds: float = LEAVING_SECONDS):
        self.root, self.path, self.me, self.say, self.lost = root, root / LOCK, Holder.here(job), say, lost
        self.beat_seconds, self.silence_seconds, self.leaving_seconds = beat_seconds, silence_seconds, leaving_seconds
        self._made_root, self.released, self.keeper = False, threading.Event(), None

    def acquire(self) -> None:
        """ValueError, which names the holder, if there is one that lives. Can take `silence_seconds`."""
        self._made_root = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        holder = self._get(self.path)
        if holder is not None:
            raise ValueError(f"--save {self.root} is in use by {holder}: two runs cannot share it; stop that one, "
                             "or save elsewhere")
        for leftover in self.root.glob(f"{LOCK}.*"):
            if self.me.token not in leftover.name:  # who takes this one's place needs the right to it
                leftover.unlink(missing_ok=True)
        self.keeper = threading.Thread(target=self.keep_beating, daemon=True, name="save-lock")
        self.keeper.start()

    def release(self) -> None:
        """Also removes the directory if `acquire` made it and nothing else is in it."""
        self.released.set()
        if self.keeper is not None:
            self.keeper.join(self.beat_seconds)
        right = self._right(self.path, self.me)
        try:
            if self._is_mine(self.path) and self._make(right):
                self._drop(self.path)
                self._drop(right)
            if self._made_root:
                self.root.rmdir()
        except OSError:
            pass  # what is left is a dead process's lock

    def _get(self, path: Path) -> Holder | None:
        """Make the file at `path` this one's. Returns the holder that is in its way, if there is one that lives."""
        while not self._make(path):
            holder = read_holder(path)
            if holder == self.me:
                break
            if holder is None:
                self.root.mkdir(parents=True, exist_ok=True)  # the one that made it may have ended
                continue
            if self._is_dead(path, holder):
                in_the_way = self._take_over(path, holder)
                if in_the_way is not None:
                    return in_the_way
            elif read_holder(path) == holder:
                return holder
        return None

    def _take_over(self, path: Path, dead: Holder) -> Holder | None:
        """Put this one's name in the place of the dead holder's, unless its place is another's by now.

        Returns who holds the right to that place and lives.
        """
        right = self._right(path, dead)
        in_the_way = self._get(right)
        if in_the_way is not None:
            return in_the_way
        try:
            if read_holder(path) == dead:
                self.put_in_place(path)
        finally:
            self._drop(right)
        return None

    @staticmethod
    def _right(path: Path, holder: Holder) -> Path:
        """Who holds this file may end what `holder` has at `path`."""
        return path.with_name(f"{path.name}.{holder.token or 'damaged'}.taken")

    def _is_mine(self, path: Path) -> bool:
        holder = read_holder(path)
        return holder is not None and holder.token == self.me.token

    def _drop(self, path: Path) -> None:
        if self._is_mine(path):
            path.unlink(missing_ok=True)

    def _make(self, path: Path) -> bool:
        """Whether the file at `path`, which was not there, is now this one's."""
        aside = self._aside()
        try:
            write_synced(aside, self._content())
            os.link(aside, path)
            return True
        except FileExistsError:
            return _links(aside) == 2  # NFS asks twice if the first answer was lost
        except FileNotFoundError:
            return False  # somebody else's `acquire` swept it
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._make_without_links(path)
        finally:
            aside.unlink(missing_ok=True)

    def _make_without_links(self, path: Path) -> bool:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def put_in_place(self, path: Path) -> None:
        """This one's file instead of the one at `path`; not if somebody else got the lock, and swept this one aside."""
        aside = self._aside()
        try:
            write_synced(aside, self._content())
            os.rename(aside, path)
        except FileNotFoundError:
            pass
        finally:
            aside.unlink(missing_ok=True)

    def _aside(self) -> Path:
        return self.path.with_name(f"{LOCK}.{self.me.token}.tmp")

    def _content(self) -> str:
        return json.dumps(asdict(self.me)) + "\n"

    def _is_dead(self, path: Path, holder: Holder) -> bool:
        """Of the holder that the file at `path` names. False as soon as it names another, or nobody."""
        if holder.job and holder.job == self.me.job:
            return True
        if holder.place and holder.place == self.me.place:
            becomes_true(self.leaving_seconds, lambda: holder.process_is_gone() or _has_left(path, holder))
            return holder.process_is_gone()
        self.say(f"{path} is held by {holder}, which may be dead: waiting {self.silence_seconds:g} s for a sign "
                 "of life")
        seen = _beat(path)
        return not becomes_true(self.silence_seconds,
                                lambda: _beat(path) not in (seen, None) or _has_left(path, holder))

    def keep_beating(self) -> None:
        """Renew the lock every `beat_seconds`. A beat that the disk refuses is tried again."""
        while not self.released.wait(self.beat_seconds):
            try:
                other = self._renew()
            except OSError:
                continue
            if other is not None:
                self.lost(other)
                return

    def _renew(self) -> Holder | None:
        """A sign of life, also if the directory was removed or the lock damaged. The holder if it is another."""
        holder = read_holder(self.path)
        if holder is None:
            self.root.mkdir(parents=True, exist_ok=True)
            self._make(self.path)
        elif not holder.token:
            os.utime(self.path)  # a full disk takes no new file
            self._take_over(self.path, holder)
        elif holder.token == self.me.token:
            os.utime(self.path)
        else:
            return holder
        return None


def _has_left(path: Path, holder: Holder) -> bool:
    """Whether the file names another, or nobody, or is gone."""
    try:
        return read_holder(path) != holder
    except OSError:
        return False


def _beat(path: Path) -> int | None:
    """A lock's time of change in ns; None where it cannot be read. Opening asks an NFS server anew."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _links(path: Path) -> int:
    """0 for a file that is not there: somebody else's `acquire` swept it."""
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0


def becomes_true(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether `condition` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(0.5, seconds / 10))
    return True
