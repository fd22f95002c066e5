"""The lock of a --save directory: one job at a time writes there, and the lock of a dead job is taken over.

The lock, run.lock, is a file that gets its name by link, which is atomic on network file systems too, where flock may
mean nothing. Its holder is dead if

    its process was on this host       and is gone, or its number belongs to a process that started at another time
    it was this job before a restart   since torchrun starts ranks anew once all of them have ended
    it was elsewhere                   and the lock's time of change, which the holder renews every BEAT_SECONDS, stays
                                       the same for SILENCE_SECONDS. It is compared with itself alone, so the clocks of
                                       two machines need not agree

Several jobs may find the same holder dead. To take over, a job first gets a second lock, the right to the dead holder's
place: a file named after the dead holder. Only the job with that right puts its own name into the lock, by one rename.
So the lock of a living holder is never moved, and the lock names a holder at every moment. A holder that ends gives its
lock up under the same right.

A holder that finds another name in its lock (it was suspended, or cut off) must stop at once: two jobs would write.
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
    """A lock that is held from `acquire` to `release`.

    `lost` is called, in a thread, with the new holder if the lock becomes another's. Neither a kill nor an exception
    releases it: a save in the background may still write, and ends with the process.
    """

    def __init__(self, root: Path, job: str, say: Callable[[str], None], lost: Callable[[Holder], None],
                 beat_seconds: float = BEAT_SECONDS, silence_seconds: float = SILENCE_SECONDS,
                 leaving_seconds: float = LEAVING_SECONDS):
        self.root, self.path, self.me, self.say, self.lost = root, root / LOCK, Holder.here(job), say, lost
        self.beat_seconds, self.silence_seconds, self.leaving_seconds = beat_seconds, silence_seconds, leaving_seconds
        self._made_root, self.released, self.keeper = False, threading.Event(), None

    def acquire(self) -> None:
        """Take the lock. Raise ValueError, which names the holder, if there is one that lives.

        This can take `silence_seconds`.
        """
        self._made_root = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        holder = self._get(self.path)
        if holder is not None:
            raise ValueError(f"--save {self.root} is in use by {holder}: two runs cannot share it; stop that one, "
                             "or save elsewhere")
        for leftover in self.root.glob(f"{LOCK}.*"):
            if self.me.token not in leftover.name:  # such a file is the right of a job that takes over from this one
                leftover.unlink(missing_ok=True)
        self.keeper = threading.Thread(target=self.keep_beating, daemon=True, name="save-lock")
        self.keeper.start()

    def release(self) -> None:
        """Give the lock up, and remove the directory if `acquire` made it and nothing else is in it."""
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
            pass  # a lock that stays behind is that of a dead process

    def _get(self, path: Path) -> Holder | None:
        """Make the file at `path` this holder's, or return the living holder that is in its way."""
        while not self._make(path):
            holder = read_holder(path)
            if holder == self.me:
                break
            if holder is None:
                self.root.mkdir(parents=True, exist_ok=True)  # the job that made it may have ended and removed it
                continue
            if self._is_dead(path, holder):
                in_the_way = self._take_over(path, holder)
                if in_the_way is not None:
                    return in_the_way
            elif read_holder(path) == holder:
                return holder
        return None

    def _take_over(self, path: Path, dead: Holder) -> Holder | None:
        """Put this holder's name in place of the dead one's, unless another has that place by now.

        Return the living holder that has the right to that place, None if there is none.
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
        """Return the file whose holder may end the hold that `holder` has on `path`."""
        return path.with_name(f"{path.name}.{holder.token or 'damaged'}.taken")

    def _is_mine(self, path: Path) -> bool:
        holder = read_holder(path)
        return holder is not None and holder.token == self.me.token

    def _drop(self, path: Path) -> None:
        if self._is_mine(path):
            path.unlink(missing_ok=True)

    def _make(self, path: Path) -> bool:
        """Make the file at `path` if there is none. Return whether it was made, and is this holder's."""
        aside = self._aside()
        try:
            write_synced(aside, self._content())
            os.link(aside, path)
            return True
        except FileExistsError:
            return _links(aside) == 2  # made all the same: NFS asks twice if the first answer was lost
        except FileNotFoundError:
            return False  # another job's `acquire` removed `aside`
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
        """Replace the file at `path` by this holder's, unless another job got the lock and removed `aside`."""
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
        """Return whether `holder`, which the file at `path` names, is dead.

        False as soon as the file names another, or nobody.
        """
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
        """Give a sign of life, also if the directory was removed or the lock damaged.

        Return the holder if it is another, else None.
        """
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
    """Return whether the file names another holder, or nobody, or is gone."""
    try:
        return read_holder(path) != holder
    except OSError:
        return False


def _beat(path: Path) -> int | None:
    """Return a lock's time of change in ns; None where it cannot be read. Opening it asks an NFS server anew."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _links(path: Path) -> int:
    """Return the number of links of a file; 0 if it is not there, since another job's `acquire` removed it."""
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0


def becomes_true(seconds: float, condition: Callable[[], bool]) -> bool:
    """Return whether `condition` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(0.5, seconds / 10))
    return True
