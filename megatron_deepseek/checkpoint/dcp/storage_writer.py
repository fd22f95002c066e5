"""DCP's StorageWriter for saving from a job: files go to iter_N.saving with checksums, then are published at once.

Everything that makes a checkpoint whole happens inside DCP's own protocol, so that it is the same for a synchronous
save and for one in a background thread, and an error on any rank reaches every rank:

    prepare_global_plan, rank 0    makes iter_N.saving, checks that the disk has room
    write_data, every rank         writes its file, takes the checksum meanwhile, fsyncs
    finish, rank 0                 adds .metadata, config.json, state.json and checksums.json, checks sizes, publishes
"""

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization

from megatron_deepseek.checkpoint.integrity import (
    Checksum,
    RunningChecksum,
    check_sizes,
    checksum_directory,
    read_checksums,
)
from megatron_deepseek.checkpoint.publishing import begin, publish, saving_directory, write_synced
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.architecture.config import ModelConfig

_SHARED_SECONDS = 60.0  # for so long NFS may show an old listing of a directory
_HEADER_BYTES = 2048  # about what torch.save writes around each tensor


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes iteration `state.iteration` under `root` and makes it the last one. Every rank has its own writer.

    `notes` are further JSON files by name; those of rank 0 are written. `still_mine` raises, or ends the process, if
    another run has taken over `root`; it is called before anything there is made, removed or renamed. `complete` adds
    files on rank 0 that are made of the tensors, which are all in the directory by then.
    """

    def __init__(self, root: Path, state: TrainState, config: ModelConfig, keep_last: int | None = None,
                 notes: Mapping[str, Any] | None = None, still_mine: Callable[[], None] = lambda: None,
                 complete: Callable[[Path], None] = lambda directory: None):
        super().__init__(saving_directory(root, state.iteration), sync_files=True)
        self.root, self.state, self.config, self.keep_last = root, state, config, keep_last
        self.notes, self.still_mine, self.complete = notes or {}, still_mine, complete
        self.fs = _ChecksummedFiles()

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Do nothing: DCP names the directory here, which the constructor was given already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan without DCP's mkdir: rank 0 makes the directory, once what was there is removed."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the directory on rank 0; raise OSError with errno ENOSPC if the disk has no room for the files."""
        self.still_mine()
        begin(self.root, self.state.iteration)
        needed = bytes_of(plans)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise disk_full(self.root, f"{needed:,} bytes are to be written, {free:,} are free")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; its checksum goes to rank 0 as one more result."""
        self.still_mine()
        self.path.mkdir(exist_ok=True)  # a network file system may not show rank 0's yet
        try:
            with serialization.patch("save.compute_crc32", False):  # for this thread; XXH3 is ten times as fast
                results = super().write_data(plan, planner).value()
        except (OSError, RuntimeError) as error:  # torch.save hides an OSError of its file behind a RuntimeError
            raise self.fs.failure or error from None
        results.append(WriteResult(MetadataIndex(_CHECKSUMS), 0, (socket.gethostname(), self.fs.written)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Add on rank 0 the files that make a checkpoint whole, check all sizes, and publish it."""
        ranks = [Written(*of_rank.pop().storage_data) for of_rank in results]
        await_files(self.path, ranks)
        self.still_mine()
        super().finish(metadata, results)
        write_synced(self.path / "config.json", json.dumps(self.config.to_hf_dict(), indent=2))
        write_synced(self.path / "state.json", json.dumps(self.state.to_json(), indent=2))
        for name, content in self.notes.items():
            write_synced(self.path / name, json.dumps(content, indent=2))
        self.complete(self.path)
        checksum_directory(self.path, {name: of_rank.files[name] for of_rank in ranks for name in of_rank.files})
        damage = check_sizes(self.path, read_checksums(self.path))
        if damage:
            raise OSError(errno.EIO, f"the checkpoint came out damaged: {'; '.join(map(str, damage))}", str(self.path))
        self.still_mine()
        publish(self.root, self.state.iteration, self.keep_last)


@dataclass(frozen=True)
class Written:
    """What a rank tells rank 0: its host, and the checksums of its files by name."""

    host: str
    files: dict[str, Checksum]


def await_files(directory: Path, ranks: Sequence[Written], seconds: float = _SHARED_SECONDS) -> None:
    """Wait until this host sees every file that the ranks wrote, which network file systems may show late.

    Raise OSError if it does not see them in time. Other hosts may have written to disks of their own under the same
    name, and a checkpoint without those files must not be called whole.
    """
    deadline = time.monotonic() + seconds
    while absent := _absent(directory, ranks):
        if time.monotonic() > deadline:
            rank, name = min(absent)
            more = f" and {len(absent) - 1} more files are" if len(absent) > 1 else " is"
            raise OSError(errno.ENOENT, f"{name}, which rank {rank} wrote on {ranks[rank].host},{more} not seen on "
                                        f"{socket.gethostname()}: no shared file system?", str(directory))
        time.sleep(min(0.2, seconds / 10))


def _absent(directory: Path, ranks: Sequence[Written]) -> list[tuple[int, str]]:
    """List the files that are not in the directory, as pairs of rank and name."""
    there = set(os.listdir(directory))
    return [(rank, name) for rank, of_rank in enumerate(ranks) for name in of_rank.files if name not in there]


def bytes_of(plans: list[SavePlan]) -> int:
    """Return about how many bytes all ranks write together; DCP has given each chunk to one rank by now."""
    chunks = [item.tensor_data for plan in plans for item in plan.items if item.type != WriteItemType.BYTE_IO]
    return sum(prod(data.chunk.sizes) * data.properties.dtype.itemsize + _HEADER_BYTES for data in chunks)


_CHECKSUMS = "checksums of this rank's files"


def disk_full(path: Path, detail: str) -> OSError:
    return OSError(errno.ENOSPC, f"no room for a checkpoint: {detail}", str(path))


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class _ChecksummedFiles(FileSystem):
    """DCP's file system, with bytes going from the tensor's memory through a checksum straight to the kernel.

    `written` has the checksums of finished files by name, `failure` the first error of a write.
    """

    def __init__(self):
        self.written: dict[str, Checksum] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator["ChecksummedFile"]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with open(path, "wb", buffering=0) as raw:
            stream = ChecksummedFile(raw)
            try:
                yield stream
            except BaseException:
                self.failure = self.failure or stream.failure
                raise
        self.written[Path(path).name] = stream.checksum.result()


class ChecksummedFile:
    """A file written from beginning to end, with the methods that DCP and torch.save call."""

    def __init__(self, raw):
        self._raw, self.checksum, self.failure = raw, RunningChecksum(), None
        self._position = 0

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self.checksum.update(data)
        self._position += len(data)
        try:
            while len(data):
                data = data[self._raw.write(data):]
        except OSError as error:
            free = shutil.disk_usage(Path(self._raw.name).parent).free
            self.failure = disk_full(Path(self._raw.name), f"{len(data):,} bytes of this file are left, {free:,} are "
                                     f"free") if is_disk_full(error) else error
            raise self.failure from error
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Do nothing, since nothing is buffered."""

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        """Leave the file open: `create_stream` closes it."""
