"""The storage side of a save: DCP's files written aside, with checksums taken on the way, then published at once.

Everything that makes a checkpoint whole happens inside DCP's own protocol, so that it is the same for a synchronous
save and for one in a background thread, and an error on any rank reaches every rank:

    plans meet on the coordinator    is there room on the disk? then the directory aside is made
    each rank writes its file        checksummed while it is written, then fsynced
    results meet on the coordinator  .metadata, config.json, state.json, checksums.json; sizes checked; published
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

_SHARED_SECONDS = 60.0  # that NFS may remember what a directory was like
_HEADER_BYTES = 2048  # about, around each tensor: torch.save's zip


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes iteration `state.iteration` under `root` and makes it the last one; every rank has its own.

    `notes`: further JSON files by name, of which the coordinator's count. `still_mine` raises, or ends the process, if
    `root` has become another run's: called before anything there is made, removed or renamed.
    """

    def __init__(self, root: Path, state: TrainState, config: ModelConfig, keep_last: int | None = None,
                 notes: Mapping[str, Any] | None = None, still_mine: Callable[[], None] = lambda: None):
        super().__init__(saving_directory(root, state.iteration), sync_files=True)
        self.root, self.state, self.config, self.keep_last = root, state, config, keep_last
        self.notes, self.still_mine = notes or {}, still_mine
        self.fs = _ChecksummedFiles()

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Where to write is said once, in the constructor; DCP asks again."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Without DCP's mkdir: the coordinator makes the directory, once there is nothing old in it."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.still_mine()
        begin(self.root, self.state.iteration)
        needed = bytes_of(plans)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise disk_full(self.root, f"{needed:,} bytes are to be written, {free:,} are free")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file; its checksum travels to the coordinator as one more result."""
        self.still_mine()
        self.path.mkdir(exist_ok=True)  # for a network file system that has not seen the coordinator's yet
        try:
            with serialization.patch("save.compute_crc32", False):  # of this thread; XXH3 is ten times as fast
                results = super().write_data(plan, planner).value()
        except (OSError, RuntimeError) as error:  # torch.save hides an OSError of its file behind a RuntimeError
            raise self.fs.failure or error from None
        results.append(WriteResult(MetadataIndex(_CHECKSUMS), 0, (socket.gethostname(), self.fs.written)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        ranks = [Written(*of_rank.pop().storage_data) for of_rank in results]
        await_files(self.path, ranks)
        self.still_mine()
        super().finish(metadata, results)
        write_synced(self.path / "config.json", json.dumps(self.config.to_hf_dict(), indent=2))
        write_synced(self.path / "state.json", json.dumps(self.state.to_json(), indent=2))
        for name, content in self.notes.items():
            write_synced(self.path / name, json.dumps(content, indent=2))
        checksum_directory(self.path, {name: of_rank.files[name] for of_rank in ranks for name in of_rank.files})
        damage = check_sizes(self.path, read_checksums(self.path))
        if damage:
            raise OSError(errno.EIO, f"the checkpoint came out damaged: {'; '.join(map(str, damage))}", str(self.path))
        self.still_mine()
        publish(self.root, self.state.iteration, self.keep_last)


@dataclass(frozen=True)
class Written:
    """What a rank says of its files, by name."""

    host: str
    files: dict[str, Checksum]


def await_files(directory: Path, ranks: Sequence[Written], seconds: float = _SHARED_SECONDS) -> None:
    """Until this host sees every file that the ranks wrote; network file systems may show it late. OSError if it does
    not: what other hosts wrote to their own disks under the same name would be lost, in a checkpoint called whole.
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
    """Ranks and their files that are not in the directory."""
    there = set(os.listdir(directory))
    return [(rank, name) for rank, of_rank in enumerate(ranks) for name in of_rank.files if name not in there]


def bytes_of(plans: list[SavePlan]) -> int:
    """What all ranks together write: of each tensor the chunks, which DCP has given to one rank each by now."""
    chunks = [item.tensor_data for plan in plans for item in plan.items if item.type != WriteItemType.BYTE_IO]
    return sum(prod(data.chunk.sizes) * data.properties.dtype.itemsize + _HEADER_BYTES for data in chunks)


_CHECKSUMS = "checksums of this rank's files"


def disk_full(path: Path, detail: str) -> OSError:
    return OSError(errno.ENOSPC, f"no room for a checkpoint: {detail}", str(path))


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class _ChecksummedFiles(FileSystem):
    """Files whose bytes go straight from the tensor to the kernel and through a checksum, without a buffer between.

    `written`: the checksums of finished files by name. `failure`: the first error of a write.
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
    """What DCP and torch.save need of a file that is written from its beginning to its end."""

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
        """Nothing is buffered."""

    def fileno(self) -> int:
        return self._raw.fileno()

    def close(self) -> None:
        """The file is closed where it was opened."""
