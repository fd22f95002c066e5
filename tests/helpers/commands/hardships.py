"""What a job of the fault drill meets from outside: a full disk, a directory without permission, damaged files.

`upon` is a context manager around one life of the job: it brings its trouble about, yields whether there was anything
to trouble, and puts everything right afterwards, as an administrator would. `forgives` says whether a life that met it
may end with the status of the rank that ended first.
"""

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_deepseek.checkpoint.tracker import find_iteration, last_iteration

DISK_MEBIBYTES = 64  # of a job's own disk: some ten times what a job keeps
REFUSED = 2


@dataclass(frozen=True)
class JobFiles:
    """Where a job of the drill writes: everything below `disk`, which may be a file system of its own."""

    disk: Path

    @property
    def save(self) -> Path:
        return self.disk / "save"

    @property
    def export(self) -> Path:
        return self.disk / "export"

    @property
    def cache(self) -> Path:
        return self.disk / "cache"


@dataclass(frozen=True)
class FullDisk:
    """So many KiB are free when the life begins, and nobody makes room before it ends."""

    kibibytes: int

    @contextmanager
    def upon(self, files: JobFiles) -> Iterator[bool]:
        filler = files.disk / "filler"
        statistics = os.statvfs(files.disk)
        size = statistics.f_bavail * statistics.f_frsize - self.kibibytes * 1024
        with open(filler, "wb") as file:
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)
        try:
            yield True
        finally:
            filler.unlink()

    def forgives(self, status: int) -> bool:
        """It ends in a line where there was no room at its end, or not even for its cache."""
        return status in (0, REFUSED)

    def __str__(self) -> str:
        return f"{self.kibibytes} KiB free"


@dataclass(frozen=True)
class NoPermission:
    """After so many milliseconds nothing may be written any more below one of the job's directories."""

    milliseconds: int
    directory: str  # of JobFiles

    @contextmanager
    def upon(self, files: JobFiles) -> Iterator[bool]:
        root = getattr(files, self.directory)
        timer = threading.Timer(self.milliseconds / 1000, _set_modes, (root, 0o555))
        timer.start()
        try:
            yield True
        finally:
            timer.cancel()
            timer.join()
            _set_modes(root, 0o755)

    def forgives(self, status: int) -> bool:
        return status in (0, REFUSED)

    def __str__(self) -> str:
        return f"no permission for {self.directory} after {self.milliseconds} ms"


def _set_modes(root: Path, mode: int) -> None:
    for directory, _, _ in os.walk(root):
        os.chmod(directory, mode)


@dataclass(frozen=True)
class Damage:
    """A byte of a file has changed, or its end is gone, or it is something else altogether, before the life begins.

    `what`: checkpoint (any file of the last one), metadata (its .metadata), json (one of its JSON files) or cache. A
    damaged checkpoint is refused, and the files are as they were after the life; a damaged cache is made anew.
    """

    what: str
    seed: int

    @contextmanager
    def upon(self, files: JobFiles) -> Iterator[bool]:
        draw, candidates = random.Random(self.seed), self._candidates(files)
        if not candidates:
            yield False
            return
        path = draw.choice(candidates)
        before = path.read_bytes()
        path.write_bytes(damaged(before, draw))
        try:
            yield True
        finally:
            if self.what != "cache":
                path.write_bytes(before)

    def _candidates(self, files: JobFiles) -> list[Path]:
        if self.what == "cache":
            return sorted(path for path in files.cache.rglob("*") if path.is_file() and path.stat().st_size)
        last = last_iteration(files.save) if files.save.is_dir() else None
        if last is None:
            return []
        pattern = {"metadata": ".metadata", "json": "*.json", "checkpoint": "*"}[self.what]
        return sorted(path for path in find_iteration(files.save, last).glob(pattern)
                      if path.is_file() and path.stat().st_size)

    def forgives(self, status: int) -> bool:
        return status == REFUSED if self.what != "cache" else status == 0

    def __str__(self) -> str:
        return f"damaged {self.what} (seed {self.seed})"


def damaged(content: bytes, draw: random.Random) -> bytes:
    """`content` with a flipped bit, cut, grown, zeroed in part, nested JSON or nothing in its place; never the same."""
    place = draw.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1:]
    zeros = content[:place] + bytes(min(512, len(content) - place)) + content[place + 512:]
    found = draw.choice((flipped, content[:place], content + b"\0", zeros, b"[" * 100_000, b"{}"))
    return found if found != content else flipped


HARDSHIPS = (FullDisk, NoPermission, Damage)


def draw_hardship(draw: random.Random, can_fill: bool) -> FullDisk | NoPermission | Damage:
    """`can_fill`: whether jobs have disks of their own."""
    kind = draw.choice(HARDSHIPS if can_fill else HARDSHIPS[1:])
    if kind is FullDisk:
        return FullDisk(draw.choice((0, 8, 64, 200, 500, 1000, 2000, 4000)))
    if kind is NoPermission:
        return NoPermission(draw.randint(1, 2500), draw.choice(("save", "save", "cache", "export", "disk")))
    return Damage(draw.choice(("checkpoint", "metadata", "json", "cache")), draw.randrange(2**31))


def mount_disk(directory: Path) -> bool:
    """A small file system in memory at `directory`, for root; False where that is not allowed."""
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEBIBYTES}m", "drill", str(directory)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def unmount_disk(directory: Path) -> None:
    subprocess.run(["umount", "--lazy", str(directory)], capture_output=True)
