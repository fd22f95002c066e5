"""How a directory of files becomes the last checkpoint, and older ones go: each step leaves a loadable state behind.

What a kill finds at any moment:
  1. files are written to iter_N.saving: the tracker names the previous checkpoint
  2. the tracker's next content is written and on the disk, under another name
  3. an iter_N that exists already (a run that went back) is renamed to iter_N.replaced, which loading takes for iter_N
  4. iter_N.saving is renamed to iter_N: it is whole, the tracker still names the previous one
  5. the tracker is replaced
  6. what is no longer needed is renamed to *.removing, then removed
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from megatron_deepseek.checkpoint.tracker import (
    TRACKER,
    REMOVING,
    REPLACED,
    SAVING,
    find_iteration,
    iteration_directory,
    iterations,
    last_iteration,
    leftovers,
    next_tracker,
)


class Unnamed(OSError):
    """A checkpoint is whole and has its name, but the tracker could not be replaced: loading may take another one."""


def check_writable(option: str, path: Path) -> Path:
    """What exists of `path`, if files can be made there. ValueError if not, long before the first is to be written."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path}: nothing can be written to {there}: {error.strerror}") from error
    return there


def saving_directory(root: Path, iteration: int) -> Path:
    directory = iteration_directory(root, iteration)
    return directory.with_name(directory.name + SAVING)


def begin(root: Path, iteration: int) -> Path:
    """Remove what killed runs left under `root` and make the directory to write to."""
    root.mkdir(parents=True, exist_ok=True)
    settle(root)
    directory = saving_directory(root, iteration)
    directory.mkdir()
    return directory


def settle(root: Path) -> None:
    """Finish what a kill interrupted: remove torn directories, give a replaced one its name back.

    What cannot be removed (NFS keeps what somebody has open) costs no checkpoint: it stays, and `leftover_notes` tell.
    """
    for path in leftovers(root):
        with suppress(OSError):
            shutil.rmtree(_set_aside(path))
    for path in root.glob(f"iter_*{REPLACED}"):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))


def _set_aside(path: Path) -> Path:
    """The name under which a directory is removed: half of a replaced one must never be taken for a checkpoint."""
    if path.suffix != REPLACED:
        return path
    aside = path.with_suffix(REMOVING)
    os.rename(path, aside)
    return aside


def publish(root: Path, iteration: int, keep_last: int | None = None) -> Path:
    """Make the files of `saving_directory`, which are on the disk, the last checkpoint; returns its directory.

    With `keep_last`, all but so many of the newest finished checkpoints are removed.
    """
    directory, saving = iteration_directory(root, iteration), saving_directory(root, iteration)
    sync_directory(saving)
    write_synced(next_tracker(root), f"{iteration}\n")
    if directory.exists():
        older = directory.with_name(directory.name + REPLACED)
        shutil.rmtree(older, ignore_errors=True)
        os.rename(directory, older)
    os.rename(saving, directory)
    _mark(root, directory)
    with suppress(OSError):  # what cannot be looked for now is removed by the next save
        if keep_last is not None:
            _keep_newest(root, keep_last)
        settle(root)
    return directory


def _mark(root: Path, directory: Path) -> None:
    """Let the tracker name `directory`. Raise Unnamed, which says what loading takes, if the file system refuses."""
    try:
        sync_directory(root)
        os.replace(next_tracker(root), root / TRACKER)
    except OSError as error:
        raise Unnamed(error.errno, f"{error.strerror}; {directory} is whole, {_what_loading_takes(root, directory)}",
                      str(root / TRACKER)) from error
    with suppress(OSError):
        sync_directory(root)


def _what_loading_takes(root: Path, newest: Path) -> str:
    last = last_iteration(root)
    if last is None:
        return "but --ckpt-step must say so"
    taken = find_iteration(root, last)
    return "and is what loading takes" if taken == newest else f"but loading takes {taken} unless --ckpt-step is given"


def _keep_newest(root: Path, count: int) -> None:
    """The one that the tracker names stays in any case: after going back it may not be among the newest."""
    named = last_iteration(root)
    for iteration in iterations(root)[:-count]:
        if iteration != named:
            directory = iteration_directory(root, iteration)
            with suppress(OSError):  # the remains of an earlier one of that iteration are in the way
                os.rename(directory, directory.with_name(directory.name + REMOVING))


def sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk, where the system can (some network file systems can't)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """A small file whose content is on the disk when this returns. An OSError names it."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
