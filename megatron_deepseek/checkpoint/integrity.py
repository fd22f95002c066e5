"""Checksums of a checkpoint: checksums.json says what every file was when it was written; `verify_*` if it still is.

    {"algorithm": "xxh3_128", "files": {"__0_0.distcp": {"bytes": 1048576, "digest": "9f..."}, ...}}

It lists every file of the directory but itself. XXH3 finds what disks, copies and kills do to a file, at about the
speed of memory; it is no protection against somebody who wants a file to look unchanged.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import xxhash

from megatron_deepseek.foreign_json import LARGEST_LIST, JsonObject, read_object

CHECKSUMS = "checksums.json"
ALGORITHM = "xxh3_128"
_READ_BYTES = 1 << 22
_WEIGHT_FILES = ("*.safetensors", "*.distcp", ".metadata")


@dataclass(frozen=True)
class Checksum:
    """Size and XXH3 digest (128 bits, hexadecimal) of a file."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file, by its name relative to the directory.

    `kind` is missing, truncated, longer, changed, unlisted or unreadable. `detail` goes on in words after the name.
    """

    file: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file} {self.detail}"


class RunningChecksum:
    """The checksum of a file that is being written from its beginning to its end."""

    def __init__(self):
        self._hash, self._bytes = xxhash.xxh3_128(), 0

    def update(self, data) -> None:
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes

    def result(self) -> Checksum:
        return Checksum(self._bytes, self._hash.hexdigest())


def checksum_file(path: Path, advance: Callable[[int], None] = lambda nbytes: None) -> Checksum:
    """Return the checksum of a file on disk, which is read once in blocks of 4 MiB.

    `advance` is told the bytes of each block. Python's lock is released, so threads work at the same time.
    """
    running, buffer = RunningChecksum(), memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            running.update(buffer[:count])
            advance(count)
    return running.result()


def listed_files(directory: Path) -> list[str]:
    """Return the sorted names, relative to `directory`, of all files below it but checksums.json."""
    found = (Path(root, name).relative_to(directory) for root, _, names in os.walk(directory) for name in names)
    return sorted(path.as_posix() for path in found if path.as_posix() != CHECKSUMS)


def weights_identity(directory: Path) -> list:
    """Return what tells a directory's weights from others: their checksums, or sizes and times of their files."""
    checksums = read_checksums(directory)
    if checksums is not None:
        return sorted((name, str(each)) for name, each in checksums.items())
    files = sorted(file for pattern in _WEIGHT_FILES for file in directory.glob(pattern))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def write_checksums(directory: Path, files: Mapping[str, Checksum]) -> None:
    """Write checksums.json: it is whole from the moment it has its name, and on the disk when this returns."""
    listing = {"algorithm": ALGORITHM, "files": {name: asdict(files[name]) for name in sorted(files)}}
    aside = directory / f"{CHECKSUMS}.tmp"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(json.dumps(listing, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, directory / CHECKSUMS)


def checksum_directory(directory: Path, known: Mapping[str, Checksum] | None = None) -> None:
    """Write checksums.json of a finished directory; the checksums in `known` are taken, their files not read again."""
    others = set(listed_files(directory)) - set(known or {})
    write_checksums(directory, {**(known or {}), **{name: checksum_file(directory / name) for name in others}})


def read_checksums(directory: Path) -> dict[str, Checksum] | None:
    """Return the listing of checksums.json, None if there is none; raise ValueError if it is damaged itself."""
    path = directory / CHECKSUMS
    if not os.path.lexists(path):
        return None
    listing = read_object(path, LARGEST_LIST)
    if listing.text("algorithm") != ALGORITHM:
        raise listing.fault("algorithm", f"not {ALGORITHM}")
    return {name: _listed(listing.object("files"), name) for name in listing.object("files").fields}


def _listed(files: JsonObject, name: str) -> Checksum:
    """Return a file's entry; raise ValueError unless its name is printable and leads into the directory."""
    if not is_inside(name):
        raise ValueError(f"{files.where}: {name!r} is not the name of a file in the directory")
    entry = files.object(name)
    return Checksum(entry.integer("bytes"), entry.text("digest"))


def is_inside(name: str) -> bool:
    """Return whether the name of a file, read from JSON or a pickle, leads below the directory and fits in a line."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and name.isprintable()


def check_sizes(directory: Path, listing: Mapping[str, Checksum]) -> list[Damage]:
    """Find missing, truncated and longer files by their sizes, without reading any data."""
    return [damage for name in listing if (damage := _check_size(directory, name, listing[name])) is not None]


def verify_files(directory: Path, listing: Mapping[str, Checksum], names: Iterable[str], workers: int = 1,
                 advance: Callable[[int], None] = lambda nbytes: None) -> list[Damage]:
    """Read every byte of the files `names` of `listing` on `workers` threads and return their damage."""
    with ThreadPoolExecutor(workers, "verify") as pool:
        results = pool.map(partial(_verify_file, directory, listing, advance), names)
        return [damage for damage in results if damage is not None]


def verify_directory(directory: Path, workers: int = 1,
                     advance: Callable[[int], None] = lambda nbytes: None) -> list[Damage] | None:
    """Return all damage of a checkpoint directory in the order of names, None if it has no checksums.json.

    Raise ValueError if checksums.json itself is damaged.
    """
    listing = read_checksums(directory)
    if listing is None:
        return None
    unlisted = [Damage(name, "unlisted", f"is not in {CHECKSUMS}")
                for name in listed_files(directory) if name not in listing]
    return verify_files(directory, listing, sorted(listing), workers, advance) + unlisted


def _check_size(directory: Path, name: str, listed: Checksum) -> Damage | None:
    try:
        found = (directory / name).stat().st_size
    except FileNotFoundError:
        return Damage(name, "missing", f"is missing: {listed.bytes:,} bytes")
    except OSError as error:
        return Damage(name, "unreadable", f"cannot be read: {error.strerror}")
    if found < listed.bytes:
        return Damage(name, "truncated", f"is truncated: {found:,} of {listed.bytes:,} bytes")
    if found > listed.bytes:
        return Damage(name, "longer", f"is longer than it was written: {found:,} bytes, not {listed.bytes:,}")
    return None


def _verify_file(directory: Path, listing: Mapping[str, Checksum], advance: Callable[[int], None],
                 name: str) -> Damage | None:
    listed = listing[name]
    damage = _check_size(directory, name, listed)
    if damage is not None:
        return damage
    try:
        found = checksum_file(directory / name, advance)
    except OSError as error:
        return Damage(name, "unreadable", f"cannot be read: {error.strerror}")
    if found == listed:
        return None
    return Damage(name, "changed", f"has changed: its {ALGORITHM} is {found.digest}, written was {listed.digest}")
