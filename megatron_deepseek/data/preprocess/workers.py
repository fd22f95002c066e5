"""Processes that work through a stream of tasks.

They are forked, so that what was built before (a tokenizer of 100 MB, say) is shared and need not be sent. What they
return must be small: the data goes through files. A worker dies with the process that forked it.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait

PR_SET_PDEATHSIG = 1
SECONDS_BETWEEN_TICKS = 0.2
COUNTERS = 3


class Counters:
    """Bytes, documents and tokens done, in memory that all workers share."""

    def __init__(self):
        self._values = multiprocessing.get_context("fork").Array("q", COUNTERS)

    def add(self, *amounts: int):
        with self._values:
            for place, amount in enumerate(amounts):
                self._values[place] += amount

    def read(self) -> tuple[int, int, int]:
        with self._values:
            return tuple(self._values[:])


class _Worker:
    """A forked process and the connection to it."""

    def __init__(self, work: Callable, one_thread: bool):
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, daemon=True,
                                       args=(theirs, self.connection, work, one_thread, os.getpid()))
        self.process.start()
        theirs.close()

    def receive(self):
        """Return the result of the worker's task. Raise what the work raised, or ValueError where the worker died."""
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionError) as broken:
            self.process.join()
            code = self.process.exitcode
            how = f"killed by signal {-code}" + (", perhaps for lack of memory" if code == -9 else "") if code < 0 \
                else f"exit status {code}"
            raise ValueError(f"a worker process died ({how})") from broken
        if error is not None:
            raise error
        return result

    def stop(self):
        self.connection.close()
        self.process.terminate()
        self.process.join()


def run_tasks(tasks: Iterable, work: Callable, workers: int, tick: Callable[[], None] = lambda: None) -> Iterator:
    """Yield `work(task)` of each task, in the order in which they are done; `tick` is called now and then.

    Tasks are taken from the iterator at most `workers` ahead. An error of a task (ValueError, OSError) is raised here
    and ends all workers.
    """
    tasks, waiting = iter(tasks), deque()
    pool = [_Worker(work, one_thread=workers > 1) for _ in range(workers)]
    idle, busy, exhausted = list(pool), {}, False
    try:
        while busy or waiting or not exhausted:
            if not exhausted and len(waiting) < workers:
                task = next(tasks, None)
                exhausted = task is None
                waiting.extend(() if exhausted else (task,))
            while idle and waiting:
                worker = idle.pop()
                worker.connection.send(waiting.popleft())
                busy[worker.connection] = worker
            patience = SECONDS_BETWEEN_TICKS if exhausted or len(waiting) >= workers else 0
            for connection in wait(list(busy), patience) if busy else ():
                worker = busy.pop(connection)
                result = worker.receive()
                idle.append(worker)
                yield result
            tick()
    finally:
        for worker in pool:
            worker.stop()


def _serve(connection, parents_end, work: Callable, one_thread: bool, parent: int):
    gc.freeze()  # else objects that the parent dropped may, when destroyed, wait for threads that a fork lacks
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    if one_thread:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each worker starts a thread for each core
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send((work(task), None))
        except (ValueError, OSError) as error:
            connection.send((None, error))
        except MemoryError:
            connection.send((None, ValueError("a worker process ran out of memory")))


def die_with(parent: int):
    """Let the kernel kill this process when `parent`, which forked it, ends. Does nothing elsewhere than on Linux."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
