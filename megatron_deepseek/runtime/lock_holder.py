"""Who holds the lock of a --save directory (save_lock.py): what the file says, and whether that process lives."""

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
        return cls(uuid.uuid4().hex, socket.gethostname(), _place(), os.getpid(), process_start(os.getpid()) or "",
                   since, job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def process_is_gone(self) -> bool:
        """Whether the process of a holder in this place has ended."""
        return process_start(self.pid) != self.started


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


def other_holder(root: Path, token: str) -> Holder | None:
    """Who has the lock of `root` instead of the one with `token`; None too if nobody has: the next beat makes it again.

    OSError if that cannot be read.
    """
    holder = read_holder(root / LOCK)
    return holder if holder is not None and holder.token not in ("", token) else None


def _place() -> str:
    """This boot of this host and this namespace of process numbers: containers of one host have each their own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str | None:
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
