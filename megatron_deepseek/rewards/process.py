"""A worker process as its parent sees it: started, asked with a time limit, killed, started again."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from megatron_deepseek.rewards.result import DIED, TIMED_OUT, Failure, Value
from megatron_deepseek.rewards.spec import RewardSpec

START_SECONDS = 300.0  # to import what the functions import, on a busy machine
_ROOT = Path(__file__).parents[2]
_PROGRAM = "import sys; del sys.path[0]; from megatron_deepseek.rewards.worker import main; main()"
_OF_JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")  # which it is not in


class Worker:
    """One process that runs reward functions. It is started by the first call, and anew after one that ended it.

    Its methods block, and are called by one thread at a time.
    """

    def __init__(self, specs: Sequence[RewardSpec], memory_bytes: int | None):
        self.specs, self.memory_bytes = tuple(specs), memory_bytes
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Start the process unless it runs. Raise ValueError, naming the reward, for one that cannot be loaded."""
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._connection, other = Pipe()
        with other:
            # Not multiprocessing's spawn, which would import the parent's main program, and torch with it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(other.fileno()), str(os.getpid())],
                pass_fds=(other.fileno(),), stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
                env=_environment())
        told = self._exchange(pickle.dumps((self.specs, self.memory_bytes)), START_SECONDS)
        if isinstance(told, Failure) or "why" in told:
            self.kill()
            which, why = (", ".join(map(str, self.specs)), told.message) if isinstance(told, Failure) else (
                told["spec"], told["why"])
            raise ValueError(f"--reward {which} cannot be loaded: {why}")

    def call(self, number: int, batch: tuple[list, list, list], seconds: float) -> list[Value] | Failure:
        """Return what the function `number` gives for a batch, or why it gave nothing within `seconds`."""
        self.start()
        told = self._exchange(pickle.dumps((number, batch)), seconds)
        if isinstance(told, Failure):
            self.kill()
            return told
        if "failed" in told:
            return Failure(*told["failed"])
        return [Failure(*each) if isinstance(each, list) else each for each in told["values"]]

    def _exchange(self, message: bytes, seconds: float) -> dict | Failure:
        """Return the answer to a message. A process that is too slow is killed, which ends the waiting for it."""
        process, connection = self._process, self._connection
        try:
            with _Deadline(process.pid, seconds) as deadline:
                connection.send_bytes(message)
                told = json.loads(connection.recv_bytes())
        except (OSError, EOFError, ValueError):
            told = Failure(DIED, f"its process ended {_ending(process.wait())}") if not deadline.passed else None
        return Failure(TIMED_OUT, f"no answer within {seconds:g} s") if deadline.passed else told

    def kill(self) -> None:
        """End the process and what it started in its session."""
        if self._process is not None:
            _kill_group(self._process.pid)
            self._process.wait()
            self._connection.close()
            self._process = None


class _Deadline:
    """Kills a process, with its session, that is still asked after some seconds; `passed` says whether it did."""

    def __init__(self, process: int, seconds: float):
        self.process, self.passed, self._over = process, False, False
        self._lock, self._timer = threading.Lock(), threading.Timer(seconds, self._end)

    def __enter__(self) -> "_Deadline":
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._over = True
        self._timer.cancel()

    def _end(self) -> None:
        with self._lock:
            if not self._over:
                self.passed = True
                _kill_group(self.process)


def _environment() -> dict[str, str]:
    """Return the environment of a worker: this one's, without what would make it a rank of the job."""
    kept = {name: value for name, value in os.environ.items() if name not in _OF_JOB}
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _kill_group(process: int) -> None:
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _ending(status: int) -> str:
    return f"with status {status}" if status >= 0 else f"by signal {signal.Signals(-status).name}"
