"""One job at a time writes to a --save directory: run.lock says which one, and a dead one's lock is taken over.

The lock is a file that gets its name by link, which is atomic on network file systems too, where flock may mean
nothing. Who holds it is dead if

    its process was on this host       and is gone, or its number belongs to a process that started at another time
    it was an earlier life of this job  torchrun starts ranks anew once all of them have ended
    it was elsewhere                   and the lock's time of change, which the holder renews every BEAT_SECONDS, stays
                                       the same for SILENCE_SECONDS. It is compared with itself alone, so the clocks of
                                       two machines need not agree

A holder that finds another one's name in its lock (it was suspended, or cut off) must stop at once: two would write.
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_deepseek.checkpoint.publish import write_synced
from megatron_deepseek.foreign_json import JsonObject, parse_json

LOCK = "run.lock"
BEAT_SECONDS, SILENCE_SECONDS = 10.0, 60.0
LEAVING_SECONDS = 5.0  # ranks whose agent was killed notice it within a second or two, and end
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """`place`: what must be the same for a process number to mean the same process; `started`: when it did, in ticks.

    `since`: when the lock was made, by the clock of `host`. `job`: the same in all lives of one torchrun job.
    """

    token: str
    host: str = "?"
    place: str = ""
    pid: int = 0
    started: str = ""
    since: str = "?"
    job: str = ""

    @classmethod
    def here(cls, job: str) -> "Holder":
        since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(uuid.uuid4().hex, socket.gethostname(), _place(), os.getpid(), _process(os.getpid()) or "", since,
                   job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def process_is_gone(self) -> bool:
        """Whether the process of a holder in this place has ended."""
        return _process(self.pid) != self.started


class SaveLock:
    """Held from `acquire` to `release`. `lost` is called, in a thread, with the new holder if it becomes another's.

    Neither kills nor exceptions release it: what still writes in the background ends with the process.
    """

    def __init__(self, root: Path, job: str, say: Callable[[str], None], lost: Callable[[Holder], None],
                 beat_seconds: float = BEAT_SECONDS, silence_seconds: float = SILENCE_SECONDS,
                 leaving_seconds: float = LEAVING_SECONDS):
        self.root, self.path, self.me, self.say, self.lost = root, root / LOCK, Holder.here(job), say, lost
        self.beat_seconds, self.silence_seconds, self.leaving_seconds = beat_seconds, silence_seconds, leaving_seconds
        self._made_root, self._done, self._thread = False, threading.Event(), None

    def acquire(self) -> None:
        """ValueError, which names the holder, if there is one that lives. Can take `silence_seconds`."""
        self._made_root = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        while not self._make():
            holder = read_holder(self.path)
            if holder is None:
                continue
            if not self._is_dead(holder):
                raise ValueError(f"--save {self.root} is in use by {holder}: two runs cannot share it; stop that one, "
                                 "or save elsewhere")
            self._remove(holder)
        for leftover in self.root.glob(f"{LOCK}.*"):
            leftover.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, daemon=True, name="save-lock")
        self._thread.start()

    def release(self) -> None:
        """Also removes the directory if `acquire` made it and nothing else is in it."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(self.beat_seconds)
        try:
            holder = read_holder(self.path)
            if holder is not None and holder.token == self.me.token:
                self.path.unlink()
            if self._made_root:
                self.root.rmdir()
        except OSError:
            pass  # what is left is a dead process's lock

    def _make(self) -> bool:
        """Whether the lock is now this one's."""
        aside = self.path.with_name(f"{LOCK}.{self.me.token}.tmp")
        content = json.dumps(asdict(self.me)) + "\n"
        try:
            write_synced(aside, content)
            os.link(aside, self.path)
            return True
        except FileExistsError:
            return _links(aside) == 2  # NFS asks twice if the first answer was lost
        except FileNotFoundError:
            return False  # somebody else's `acquire` swept it
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._make_without_links(content)
        finally:
            aside.unlink(missing_ok=True)

    def _make_without_links(self, content: str) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def _is_dead(self, holder: Holder) -> bool:
        if holder.job and holder.job == self.me.job:
            return True
        if holder.place and holder.place == self.me.place:
            return _within(self.leaving_seconds, holder.process_is_gone)
        self.say(f"{self.path} is held by {holder}, which may be dead: waiting {self.silence_seconds:g} s for a sign "
                 "of life")
        seen = self._beat()
        return not _within(self.silence_seconds, lambda: self._beat() not in (seen, None))

    def _beat(self) -> int | None:
        """The lock's time of change in ns; None where it cannot be read. Opening asks an NFS server anew."""
        try:
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def _remove(self, dead: Holder) -> None:
        """Remove the lock of the dead holder, and no other: one that was made meanwhile is put back."""
        aside = self.path.with_name(f"{LOCK}.{uuid.uuid4().hex}.dead")
        try:
            if (read_holder(self.path) or dead) != dead:
                return
            os.rename(self.path, aside)
            moved = read_holder(aside)
            if moved is not None and moved != dead:
                os.rename(aside, self.path)
                return
            aside.unlink(missing_ok=True)
        except FileNotFoundError:
            pass

    def _keep(self) -> None:
        """Renew the lock; make it again if the directory was removed. A beat that the disk refuses is tried again."""
        while not self._done.wait(self.beat_seconds):
            try:
                holder = read_holder(self.path)
                if holder is None:
                    self.root.mkdir(parents=True, exist_ok=True)
                    self._make()
                elif holder.token == self.me.token:
                    os.utime(self.path)
                elif holder.token:
                    self.lost(holder)
                    return
            except OSError:
                pass


def read_holder(path: Path) -> Holder | None:
    """Who a lock names; a Holder without a token if the file is damaged, None if there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        fields = JsonObject.of(parse_json(content, path), path)
        texts = {name: fields.text(name) for name in ("token", "host", "place", "started", "since", "job")}
        return Holder(pid=fields.integer("pid"), **texts)
    except ValueError:
        return Holder("")


def _links(path: Path) -> int:
    """0 for a file that is not there: somebody else's `acquire` swept it."""
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether `condition` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(0.5, seconds / 10))
    return True


def _place() -> str:
    """This boot of this host and this namespace of process numbers: containers of one host have each their own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> str | None:
    """When a process of this place started; None if there is none, or only its exit status is left."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except FileNotFoundError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
