"""How a directory of files becomes the last checkpoint and older ones are removed; a kill costs no checkpoint.

The steps, each of which leaves a state that can be loaded:
  1. Files are written to iter_N.saving; the tracker names the previous checkpoint.
  2. The tracker's next content is written, and synced, under another name.
  3. An iter_N that exists already (a run that went back) is renamed to iter_N.replaced, which loading takes for iter_N.
  4. iter_N.saving is renamed to iter_N: it is whole, the tracker still names the previous one.
  5. The tracker is replaced.
  6. What is no longer needed is renamed to *.removing, then removed.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from megatron_deepseek.checkpoint.tracker import (
    REMOVING,
    REPLACED,
    SAVING,
    TRACKER,
    find_iteration,
    iteration_directory,
    iterations,
    last_iteration,
    leftovers,
    next_tracker,
)


class TrackerNotReplaced(OSError):
    """A new checkpoint is whole, but the tracker still names another one, which loading may take."""


def check_writable(option: str, path: Path) -> Path:
    """Return `path` or the nearest parent that exists; raise ValueError if no file can be made there.

    It is called at the start of a run, long before the first file is written.
    """
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path}: nothing can be written to {there}: {error.strerror}") from error
    return there


def saving_directory(root: Path, iteration: int) -> Path:
    """Return the directory that iteration `iteration` is written to until it is whole."""
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

    A directory that cannot be removed (NFS keeps files that are open) stays, and `leftover_notes` names it. It costs
    no checkpoint.
    """
    for path in leftovers(root):
        with suppress(OSError):
            shutil.rmtree(_set_aside(path))
    for path in root.glob(f"iter_*{REPLACED}"):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))


def _set_aside(path: Path) -> Path:
    """Return the name under which a directory is removed.

    A replaced one is renamed to it first, so that half of it is never taken for a checkpoint.
    """
    if path.suffix != REPLACED:
        return path
    aside = path.with_suffix(REMOVING)
    os.rename(path, aside)
    return aside


def publish(root: Path, iteration: int, keep_last: int | None = None) -> Path:
    """Make the files in `saving_directory`, already synced, the last checkpoint, and return its directory.

    With `keep_last`, only that many of the newest finished checkpoints stay.
    """
    directory, saving = iteration_directory(root, iteration), saving_directory(root, iteration)
    sync_directory(saving)
    write_synced(next_tracker(root), f"{iteration}\n")
    if directory.exists():
        older = directory.with_name(directory.name + REPLACED)
        shutil.rmtree(older, ignore_errors=True)
        os.rename(directory, older)
    os.rename(saving, directory)
    _replace_tracker(root, directory)
    with suppress(OSError):  # the next save removes what this one cannot
        if keep_last is not None:
            _keep_newest(root, keep_last)
        settle(root)
    return directory


def _replace_tracker(root: Path, directory: Path) -> None:
    """Let the tracker name `directory`; raise TrackerNotReplaced, saying what loading takes, if that fails."""
    try:
        sync_directory(root)
        os.replace(next_tracker(root), root / TRACKER)
    except OSError as error:
        message = f"{error.strerror}; {directory} is whole, {_what_loading_takes(root, directory)}"
        raise TrackerNotReplaced(error.errno, message, str(root / TRACKER)) from error
    with suppress(OSError):
        sync_directory(root)


def _what_loading_takes(root: Path, newest: Path) -> str:
    last = last_iteration(root)
    if last is None:
        return "but --ckpt-step must say so"
    taken = find_iteration(root, last)
    return "and is what loading takes" if taken == newest else f"but loading takes {taken} unless --ckpt-step is given"


def _keep_newest(root: Path, count: int) -> None:
    """Mark all but the newest `count` checkpoints for removal.

    The one that the tracker names stays in any case: after a run went back it may not be among the newest.
    """
    named = last_iteration(root)
    for iteration in iterations(root)[:-count]:
        if iteration != named:
            directory = iteration_directory(root, iteration)
            with suppress(OSError):  # an earlier *.removing of that iteration is in the way
                os.rename(directory, directory.with_name(directory.name + REMOVING))


def sync_directory(path: Path) -> None:
    """Sync the names in a directory to the disk, if the file system can; some network file systems cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a small file whose content is on the disk when this returns; an OSError names the file."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
