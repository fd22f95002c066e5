"""Build a directory of large files: shared among threads and processes, resumable after a kill, whole by one rename.

The caller (conversion.py, reshard.py) says what the files are and how one is written. The files are divided among the
ranks of a torchrun job, if there is one, and the threads of each rank. Threads are enough within a rank, because
reading, casting, checksums and writing all release Python's lock.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.workspace import Workspace

Advance = Callable[[int], None]


class PlannedFile(Protocol):
    """A file to write. `nbytes` is what it will have without headers."""

    name: str

    @property
    def nbytes(self) -> int:
        ...


@dataclass(frozen=True, eq=False)
class DirectoryBuild:
    """A directory to build. `destination` gets its name by one rename, once all of its files are finished.

    `what` names the work in messages. `inputs` are the files that are read, and `contents` says which tensors go into
    which file (any value that JSON takes): if either changes, the finished files of an earlier run are dropped.
    `write(path, file, advance)` writes a file and returns its fingerprint. `complete(directory, fingerprints)` adds
    what makes the files a checkpoint. `publish()` runs after the rename. `checks` come first on the threads of rank 0;
    together they read `check_bytes`.
    """

    what: str
    destination: Path
    files: Sequence[PlannedFile]
    inputs: Sequence[Path]
    contents: Any
    write: Callable[[Path, Any, Advance], Fingerprint]
    complete: Callable[[Path, dict[str, Fingerprint]], None]
    publish: Callable[[], None] = lambda: None
    checks: Sequence[Callable[[Advance], None]] = ()
    check_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Return how many bytes are to be written, headers left out."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True)
class Share:
    """This process's share of the work: `workers` threads on `rank` of `world_size`.

    `run` is the same on all ranks, and never the same in another start of the job.
    """

    workers: int = 1
    rank: int = 0
    world_size: int = 1
    run: str = "0"


def build_directory(build: DirectoryBuild, share: Share, advance: Advance, say: Callable[[str], None]) -> None:
    """Build this share of the directory `build`; rank 0 publishes it once every rank is done.

    Raise ValueError, without making `build.destination`, if anything is wrong. `advance` is told the bytes that were
    handled; `say` prints a line for the user.
    """
    workspace = Workspace(build.destination.with_name(build.destination.name + ".incomplete"))
    plan = _plan(build)
    published = workspace.published(plan, build.destination)  # an earlier run was killed just after the rename
    if not published:
        if share.rank == 0:
            _check_destination(build, workspace)
            if workspace.begin(plan):
                say(f"continuing the {build.what} in {workspace.root}")
        else:
            workspace.join(plan)
        _check_space(build, workspace)
        _work(build, workspace, share, _locked(advance))
    workspace.leave(share.rank, share.run)
    if share.rank == 0:
        workspace.wait(share.world_size, share.run)  # a late rank would wait for ever if the workspace were gone
        if not published:
            _complete(build, workspace)
        build.publish()
        workspace.remove()


def _complete(build: DirectoryBuild, workspace: Workspace) -> None:
    fingerprints = {file.name: workspace.fingerprint(file.name) for file in build.files}
    workspace.sweep()
    build.complete(workspace.output, fingerprints)
    workspace.publish(build.destination)


def _check_destination(build: DirectoryBuild, workspace: Workspace) -> None:
    destination = build.destination
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"--save {destination} exists already and is not empty")
    workspace.root.parent.mkdir(parents=True, exist_ok=True)


def _check_space(build: DirectoryBuild, workspace: Workspace) -> None:
    """Raise ValueError at once if the files cannot fit; those that are finished already count as written."""
    free = shutil.disk_usage(workspace.output).free
    needed = sum(file.nbytes for file in build.files if workspace.fingerprint(file.name) is None)
    if needed > free:
        raise ValueError(f"{build.destination}: {needed:,} bytes are to be written, {free:,} are free there")


def _plan(build: DirectoryBuild) -> dict:
    """Return what a later run must have in common with this one for the finished files to be kept."""
    read = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in build.inputs]
    digest = hashlib.sha256(json.dumps([read, build.contents]).encode()).hexdigest()
    return {"what": build.what, "digest": digest}


def _work(build: DirectoryBuild, workspace: Workspace, share: Share, advance: Advance) -> None:
    """Write this share's files on its threads. The first error stops the other threads at their next block."""
    stop = Event()

    def step(nbytes: int) -> None:
        if stop.is_set():
            raise InterruptedError("another worker failed")
        advance(nbytes)

    with ThreadPoolExecutor(share.workers, "worker") as pool:
        jobs = [pool.submit(check, step) for check in build.checks] if share.rank == 0 else []
        jobs += [pool.submit(_write_unless_finished, file, build, workspace, step)
                 for file in build.files[share.rank::share.world_size]]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # this stops nothing if all went well
            stop.set()
            pool.shutdown(cancel_futures=True)
    errors = [job.exception() for job in jobs if not job.cancelled() and job.exception() is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, InterruptedError)):
        raise error


def _write_unless_finished(file: PlannedFile, build: DirectoryBuild, workspace: Workspace, advance: Advance) -> None:
    if workspace.finished(file.name) is not None:
        advance(file.nbytes)
        return
    workspace.forget(file.name)
    workspace.finish(file.name, build.write(workspace.temporary(file.name), file, advance))


def _locked(advance: Advance) -> Advance:
    lock = Lock()

    def locked(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    return locked
