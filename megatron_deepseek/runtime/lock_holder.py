"""The holder of the lock of a --save directory (save_lock.py): what the file says, and whether its process lives."""

import os
import socket
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_deepseek.foreign_json import JsonObject, parse_json

LOCK = "run.lock"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    `place`: the boot and the namespace in which `pid` means this process. `started`: when the process started, in clock
    ticks since that boot. `since`: when the lock was made, by the clock of `host`. `job`: the same in all restarts of
    one torchrun job.
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
        return cls(uuid.uuid4().hex, socket.gethostname(), _place(), os.getpid(), process_start(os.getpid()) or "",
                   since, job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def process_is_gone(self) -> bool:
        """Return whether the process of a holder in this place has ended."""
        return process_start(self.pid) != self.started


def read_holder(path: Path) -> Holder | None:
    """Return the holder that a lock names; one without a token if the file is damaged, None if there is no file."""
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


def other_holder(root: Path, token: str) -> Holder | None:
    """Return the holder of the lock of `root` if it is another than the one with `token`, else None.

    None also if the lock is gone: the next beat makes it again. Raise OSError if the lock cannot be read.
    """
    holder = read_holder(root / LOCK)
    return holder if holder is not None and holder.token not in ("", token) else None


def _place() -> str:
    """Return this boot of this host and this namespace of process numbers; each container of a host has its own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """Return when a process of this place started, in clock ticks since the boot.

    None if there is no such process, or only its exit status is left; "" if it lives and its start cannot be told.
    """
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
