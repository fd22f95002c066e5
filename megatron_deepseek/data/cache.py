"""Files of the index cache: each sealed with a checksum, written by any number of processes on any number of nodes.

    content, then 24 bytes: "XXH3_128" and the digest of the file's name and of the digests of its blocks of 64 MiB

The seal reveals a file that a disk, a copy or a person has changed, and one that lies under another's name. It does not
protect against somebody who wants a changed file to look unchanged. Threads read the blocks: about 7 GB/s a core
(measured), so that the 12 GB of a billion samples cost a start two seconds of one core, besides the time of reading.

A file that is being written has a temporary name and is locked. One with such a name and no lock was left by a kill.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

MAGIC = b"XXH3_128"
SEAL_BYTES = len(MAGIC) + 16
BLOCK_BYTES = 1 << 26
READ_BYTES = 1 << 20
THREADS = 8
UNFINISHED = re.compile(r".*\.(samples|blend|survey\.json)\.[0-9a-f]{16}\.tmp")


class Stamp(NamedTuple):
    """The inode, size and time of change (ns) of a file: two processes that find the same ones see the same file."""

    inode: int
    size: int
    modified: int


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file, None where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that gets the name `path` once the block has succeeded, and vanishes if it fails.

    Raise ValueError where it cannot be written.
    """
    temporary = None
    try:
        temporary, file = _create(path)
        with file:
            yield file
            file.flush()
            os.replace(temporary, path)  # while it is locked
    except OSError as error:
        raise ValueError(f"the index cache: {path} cannot be written: {error.strerror or error}"
                         f"{_free(path.parent)}; --data-cache-path puts the cache elsewhere") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """Return a new file beside `path`, locked before anybody could take it for one that a kill has left."""
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        file = open(temporary, "xb")
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        own, stamp = os.fstat(file.fileno()), stamp_of(temporary)
        if stamp is not None and stamp.inode == own.st_ino:
            return temporary, file
        file.close()  # another start has removed it between the two steps


def _free(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e9:,.1f} GB are free there)"
    except OSError:
        return ""


def remove_unfinished(folder: Path):
    """Remove the unfinished files that killed processes have left in `folder`, where this process may."""
    for path in folder.glob("*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
                path.unlink()


class SealedFile:
    """Writes content to a file, and its seal at the end."""

    def __init__(self, file: BinaryIO, name: str):
        self._file = file
        self._whole, self._block, self._left = xxhash.xxh3_128(name.encode()), xxhash.xxh3_128(), BLOCK_BYTES

    def write(self, content):
        """Write bytes or a contiguous array."""
        data = memoryview(content).cast("B") if memoryview(content).nbytes else memoryview(b"")
        self._file.write(data)
        while data:
            part, data = data[:self._left], data[self._left:]
            self._block.update(part)
            self._left -= len(part)
            if not self._left:
                self._end_block()

    def _end_block(self):
        self._whole.update(self._block.digest())
        self._block, self._left = xxhash.xxh3_128(), BLOCK_BYTES

    def seal(self):
        if self._left < BLOCK_BYTES:
            self._end_block()
        self._file.write(MAGIC + self._whole.digest())


@contextlib.contextmanager
def sealing(path: Path) -> Iterator[SealedFile]:
    """Yield a file as `replacing` does, and write its seal at the end of the block."""
    with replacing(path) as file:
        sealed = SealedFile(file, path.name)
        yield sealed
        sealed.seal()


def sound_files(folder: Path, sizes: Mapping[str, int]) -> set[str]:
    """Return the names of the files that are as they were written; `sizes` has the bytes of content by name."""
    sizes = {name: size for name, size in sizes.items()
             if (stamp := stamp_of(folder / name)) is not None and stamp.size == size + SEAL_BYTES}
    with ThreadPoolExecutor(THREADS, "seal") as pool:
        blocks = {name: [pool.submit(block_digest, folder / name, begin, min(BLOCK_BYTES, size - begin))
                         for begin in range(0, size, BLOCK_BYTES)] for name, size in sizes.items()}
        return {name for name, futures in blocks.items()
                if _has_seal(folder / name, sizes[name], [future.result() for future in futures])}


def _has_seal(path: Path, size: int, digests: list[bytes | None]) -> bool:
    if None in digests:
        return False
    seal = MAGIC + xxhash.xxh3_128(path.name.encode() + b"".join(digests)).digest()
    try:
        with open(path, "rb") as file:
            file.seek(size)
            return file.read() == seal
    except OSError:
        return False


def block_digest(path: Path, begin: int, size: int) -> bytes | None:
    """Return the digest of a block, None where it cannot be read to its end."""
    running, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(size, READ_BYTES)))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            while size and (count := file.readinto(buffer[:size])):
                running.update(buffer[:count])
                size -= count
    except OSError:
        return None
    return running.digest() if not size else None
