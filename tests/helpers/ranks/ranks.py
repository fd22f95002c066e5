"""Ranks for tests: gloo jobs of any size, each in fresh processes that start in milliseconds.

Importing torch eight times costs 10-20 s on two cores. Here one server process imports it once and every job's ranks
are forked from that server. So nothing is left over between jobs: no process groups, no meshes in DTensor's
caches (which compare meshes by shape, not by group), no monkeypatch.
"""

import faulthandler
import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# What ranks and commands would import one by one; the server imports it before the first fork.
PRELOAD = ["torch", "pytest", "torch.distributed.pipelining", "torch.distributed.tensor", "torch.testing",
           "megatron_deepseek.planning.pipeline_balance", "megatron_deepseek.training.trainer",
           "megatron_deepseek.arguments.explain", "megatron_deepseek.pretraining.loop",
           "megatron_deepseek.finetuning.loop", "megatron_deepseek.cli.convert_checkpoint_run", "tokenizers"]

_SLICE = 0.5
_START = 240.0  # seconds; on a busy machine ranks take far longer to start than a test may want to wait for a hang
_JOINED = b"joined"


def forkserver() -> BaseContext:
    """Return the way to start processes that are forked from this process's one server, which starts when needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message is what it said."""


class Ranks:
    """Runs functions on gloo ranks: `run(world_size, function, *args)`."""

    def __init__(self, timeout: float = 240.0):
        self.timeout = timeout
        self._context = forkserver()

    def run(self, world_size: int, function: Callable, *args, timeout: float | None = None) -> list:
        """function(*args) on every rank of a new default process group; the results by rank.

        `function` must be importable. Raises RankFailure with the traceback of the rank that failed first.
        """
        timeout = timeout or self.timeout
        with TemporaryDirectory(prefix="ranks-") as directory:
            job = _Job(Path(directory), world_size, timeout)
            try:
                for rank in range(world_size):
                    job.start(self._context, rank, function, args)
                return job.results()
            finally:
                job.end()


class _Job:
    """The processes of one call of `Ranks.run`, and a pipe from each."""

    def __init__(self, directory: Path, world_size: int, timeout: float):
        self.directory, self.world_size, self.timeout = directory, world_size, timeout
        self.processes, self.pipes = [], []

    def start(self, context, rank: int, function: Callable, args: tuple) -> None:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, daemon=True, name=f"rank {rank}", args=(
            there, rank, self.world_size, self.directory, self.timeout, function, args))
        process.start()
        there.close()
        self.processes.append(process)
        self.pipes.append(here)

    def results(self) -> list:
        """Wait for all ranks. The rank that failed keeps its connections open, so the others don't fail after it.

        Time is counted in slices, so that a machine that was suspended does not look like a hang, and from when all
        ranks have joined their group.
        """
        results, waiting, missing = {}, dict(zip(self.pipes, range(self.world_size))), self.world_size
        left = max(self.timeout, _START)
        while waiting:
            ready = wait(list(waiting), _SLICE)
            left -= 0 if ready else _SLICE
            if left <= 0:
                raise RankFailure(self._hung(sorted(waiting.values())))
            for pipe in ready:
                answer = self._receive(pipe, waiting[pipe])
                if answer == _JOINED:
                    missing -= 1
                    left = left if missing else self.timeout
                else:
                    rank = waiting.pop(pipe)
                    results[rank] = self._result(rank, *pickle.loads(answer))
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, pipe: Connection, rank: int) -> bytes:
        try:
            return pipe.recv_bytes()
        except EOFError:
            self.processes[rank].join(5)
            raise RankFailure(f"rank {rank} died with exit code {self.processes[rank].exitcode}") from None

    def _result(self, rank: int, failed: bool, value: Any) -> Any:
        if failed:
            raise RankFailure(f"rank {rank} of {self.world_size} failed:\n{value}")
        return value

    def _hung(self, ranks: list[int]) -> str:
        started = [rank for rank in ranks if _stack_file(self.directory, rank).exists()]
        for rank in started:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(_SLICE)
        stacks = "\n".join(f"rank {rank}:\n" + (_stack_file(self.directory, rank).read_text() if rank in started else
                                                "not started yet") for rank in ranks)
        return f"ranks {ranks} of {self.world_size} had no result after {self.timeout:.0f} s; they were here:\n{stacks}"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes):
            process.join()
            process.close()
            pipe.close()


def _stack_file(directory: Path, rank: int) -> Path:
    return directory / f"stack-{rank}"


def _rank_main(pipe: Connection, rank: int, world_size: int, directory: Path, timeout: float, function: Callable,
               args: tuple) -> None:
    """One rank: join the group, run, answer, and wait for the end so that no peer sees a connection break."""
    with open(_stack_file(directory, rank), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            _join(rank, world_size, directory, timeout)
            pipe.send_bytes(_JOINED)
            answer = False, function(*args)
        except BaseException:
            answer = True, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
        time.sleep(60 + timeout)


def _join(rank: int, world_size: int, directory: Path, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.ERROR)  # DTensor's advice on gathering whole tensors
    warnings.simplefilter("error", FutureWarning)  # users would read it from every rank
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size,
                            timeout=timedelta(seconds=600 + timeout))
