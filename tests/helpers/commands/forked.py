"""Commands in processes that begin with everything imported, forked from the server that tests' ranks are forked from.

A command spends 3 to 5 seconds of processor time on imports, far more than on a test's work. Where a test looks at what
a command does, it may have it from here; where at how a process begins, is launched, or dies, it starts a real one.
"""

import os
import runpy
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from ranks import forkserver

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_PATIENCE = 30.0  # seconds that ranks have to leave on SIGTERM once one has failed


def run_script(words: Sequence[str], out: Path, errors: Path, num_ranks: int = 1, timeout: float = 240.0) -> int:
    """Return the exit status of the script `words[0]` with the arguments `words[1:]`; what it prints is added to files.

    With several ranks, which have no torchrun above them, the status of the first that failed, else 0. As torchrun
    does, the others are then told to end. Raises TimeoutError.
    """
    with running_script(words, out, errors, num_ranks) as processes:
        return _first_failure(processes, time.monotonic() + timeout)


@contextmanager
def running_script(words: Sequence[str], out: Path, errors: Path, num_ranks: int = 1) -> Iterator[list]:
    """Run the script `words[0]` beside the block, as `run_script` does, and kill what is left of it at the end.

    The block gets the processes of the ranks, with `pid`, `exitcode` and `join`.
    """
    processes = [forkserver().Process(target=_run, args=(list(words), environ, out, errors))
                 for environ in _environments(num_ranks)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _environments(num_ranks: int) -> list[dict[str, str]]:
    if num_ranks == 1:
        return [ENVIRONMENT]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = ENVIRONMENT | {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": str(port)}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _first_failure(processes: list, deadline: float) -> int:
    running, status = list(processes), 0
    while running:
        if not wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"{len(running)} of {len(processes)} processes have not ended")
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode and not status:
                status, deadline = process.exitcode, min(deadline, time.monotonic() + _PATIENCE)
                for other in running:
                    other.terminate()
    return status


def _run(words: list[str], environ: dict[str, str], out: Path, errors: Path) -> None:
    """Be the script: Python's own ending turns what it raises into a traceback and a status."""
    for path, stream in ((out, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(environ)
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
    import torch

    torch.set_num_threads(1)
    runpy.run_path(words[0], run_name="__main__")
