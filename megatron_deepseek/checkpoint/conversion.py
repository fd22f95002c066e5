"""Conversion of a checkpoint between formats, in memory that does not grow with the model.

    source (huggingface.py, native, megatron.py) -> blocks of rows -> shards, one file each -> workspace -> SAVE

Every tensor passes under its Hugging Face name, a few rows at a time. Shards are divided among the ranks of a torchrun
job, if there is one, and the threads of each rank: reading, casting, checksums and writing all release Python's lock.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

import torch

from megatron_deepseek.checkpoint import block_fp8
from megatron_deepseek.checkpoint.blocks import FP8, Output, check_copies
from megatron_deepseek.checkpoint.names import BIAS
from megatron_deepseek.checkpoint.shards import Record, Shard
from megatron_deepseek.checkpoint.source import Source
from megatron_deepseek.checkpoint.workspace import Workspace

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}


@dataclass(frozen=True, eq=False)
class Target:
    """A format to write. `destination` is made by one rename of the finished files' directory.

    `write(path, shard, advance)` writes a file; `complete(directory, records)` adds what makes the files a checkpoint;
    `publish()` runs after the rename.
    """

    kind: str
    destination: Path
    shards: tuple[Shard, ...]
    write: Callable[[Path, Shard, Callable[[int], None]], Record]
    complete: Callable[[Path, dict[str, Record]], None]
    publish: Callable[[], None] = lambda: None

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True)
class Share:
    """This process's part of the work. `run` tells one start of a torchrun job from another."""

    workers: int = 1
    rank: int = 0
    world_size: int = 1
    run: str = "0"


def output_dtype(name: str, stored: torch.dtype, requested: torch.dtype | None, to_fp8: bool = True) -> torch.dtype:
    """What the tensor `name` becomes. Router biases are never narrowed: they decide between near-equal scores.

    Under fp8, what the release keeps in higher precision becomes bfloat16 unless it has 16 bits already. Without a
    request the stored type stays, float8 becomes bfloat16 where the target has no float8.
    """
    if requested == FP8:
        if block_fp8.is_quantized(name):
            return FP8
        requested = stored if stored.itemsize == 2 else torch.bfloat16
    elif requested is None:
        requested = torch.bfloat16 if stored == FP8 and not to_fp8 else stored
    if name.endswith(BIAS) and requested.itemsize < stored.itemsize:
        return stored
    return requested


def outputs(source: Source, requested: torch.dtype | None, to_fp8: bool, copies: dict[str, str]) -> list[Output]:
    """Everything to write, in the order of the layers; `copies`: further names, and what each is a copy of."""
    result = []
    for name in source.shapes:
        named = [name, *(copy for copy, original in copies.items() if original == name)]
        dtype = output_dtype(name, source.dtypes[name], requested, to_fp8)
        result += [Output(each, name, source.shapes[name], dtype) for each in named]
    return result


def convert(source: Source, target: Target, share: Share, advance: Callable[[int], None],
            say: Callable[[str], None]) -> None:
    """Write `target` from `source`. ValueError, and no `target.destination`, where anything is wrong."""
    workspace = Workspace(target.destination.with_name(target.destination.name + ".incomplete"))
    plan = _plan(source, target)
    if workspace.published(plan, target.destination):  # killed just after the rename
        _finish(target, workspace, share)
        return
    if share.rank == 0:
        _check_destination(target, workspace)
        if workspace.begin(plan):
            say(f"continuing the conversion in {workspace.root}")
    else:
        workspace.join(plan)
    _check_space(target, workspace)
    _work(source, target, workspace, share, _locked(advance))
    workspace.leave(share.rank, share.run)
    if share.rank == 0:
        workspace.wait(share.world_size, share.run)
        records = {shard.name: workspace.record(shard.name) for shard in target.shards}
        workspace.sweep()
        target.complete(workspace.output, records)
        workspace.publish(target.destination)
    _finish(target, workspace, share)


def _finish(target: Target, workspace: Workspace, share: Share) -> None:
    if share.rank == 0:
        target.publish()
        workspace.remove()


def _check_destination(target: Target, workspace: Workspace) -> None:
    destination = target.destination
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"--save {destination} exists already and is not empty")
    workspace.root.parent.mkdir(parents=True, exist_ok=True)


def _check_space(target: Target, workspace: Workspace) -> None:
    """Refuse at once what cannot fit; files that are finished already count as written."""
    free = shutil.disk_usage(workspace.output).free
    needed = sum(shard.nbytes for shard in target.shards if workspace.record(shard.name) is None)
    if needed > free:
        raise ValueError(f"{target.destination}: {needed:,} bytes are to be written, {free:,} are free there")


def _plan(source: Source, target: Target) -> dict:
    """What a later run must have in common with this one for its finished files to be kept."""
    read = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files()]
    made = [[shard.name, [[output.name, output.original, str(output.dtype)] for output in shard.outputs]]
            for shard in target.shards]
    digest = hashlib.sha256(json.dumps([read, made]).encode()).hexdigest()
    return {"kind": target.kind, "source": str(source.path.resolve()), "digest": digest}


def _work(source: Source, target: Target, workspace: Workspace, share: Share, advance: Callable[[int], None]) -> None:
    """This share's shards on its threads. The first error stops the others at their next block."""
    stop = Event()

    def step(nbytes: int) -> None:
        if stop.is_set():
            raise InterruptedError("another worker failed")
        advance(nbytes)

    with ThreadPoolExecutor(share.workers, "convert") as pool:
        jobs = [pool.submit(check_copies, source, step)] if share.rank == 0 else []
        jobs += [pool.submit(_make, shard, target, workspace, step)
                 for shard in target.shards[share.rank::share.world_size]]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # nothing is left to stop where all went well
            stop.set()
            pool.shutdown(cancel_futures=True)
    errors = [job.exception() for job in jobs if not job.cancelled() and job.exception() is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, InterruptedError)):
        raise error


def _make(shard: Shard, target: Target, workspace: Workspace, advance: Callable[[int], None]) -> None:
    if workspace.finished(shard.name) is not None:
        advance(shard.nbytes)
        return
    workspace.forget(shard.name)
    workspace.finish(shard.name, target.write(workspace.temporary(shard.name), shard, advance))


def _locked(advance: Callable[[int], None]) -> Callable[[int], None]:
    lock = Lock()

    def locked(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    return locked


def dtype_bytes(shards: tuple[Shard, ...]) -> dict[torch.dtype, int]:
    """Bytes written of each type."""
    total: Counter = Counter()
    for shard in shards:
        for output in shard.outputs:
            total[output.dtype] += output.nbytes
    return dict(total)

