"""Runs a program that somebody else wrote, such as a model, where it can do no harm.

    outcome = run("print(6 * 7)", Limits(seconds=3))
    outcome.passed, outcome.output            # True, "42\\n"

A program passes if it reaches its last line and ends with status 0 within its limits. It can still read files of this
machine that its user may read, and a program that looks for the mark of its end can set that itself: the sandbox
protects the machine, not the test from one that knows the sandbox.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import BinaryIO

from megatron_deepseek.sandbox.inside import ENDED, STARTED

PASSED, FAILED, TIMEOUT = "passed", "failed", "timed out"
_INSIDE = Path(__file__).with_name("inside.py")
_SHOWN = 4096  # bytes of what a program printed, from its end
_START_SECONDS = 20.0  # beside its own, in which a busy machine starts it


class NoSandbox(RuntimeError):
    """The machine cannot isolate programs, or cannot start them at all."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. A value that is not positive raises ValueError with its name.

    `seconds` of the wall clock for the program itself; `memory_bytes` of address space of each process; `processes` at
    a time, threads included; `file_bytes` of one file and of what is printed; `folder_bytes` of all files.
    """

    seconds: float = 3.0
    memory_bytes: int = 512 * 2**20
    processes: int = 16
    file_bytes: int = 2**20
    folder_bytes: int = 64 * 2**20

    def __post_init__(self):
        for name in ("seconds", "memory_bytes", "processes", "file_bytes", "folder_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0")


@dataclass(frozen=True)
class Isolation:
    """What the machine isolates. `namespaces`: network, processes and files. `processes`: their number is limited.

    `why`: what was missing, in words, where something is.
    """

    namespaces: bool
    processes: bool
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a program. `status` is "passed", "failed" or "timed out"; `code` its exit status, 128 + N after
    signal N, None after a time-out. `output` and `errors` are the ends of what it printed.
    """

    status: str
    code: int | None
    output: str
    errors: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == PASSED

    @property
    def reason(self) -> str:
        """Return in a line why it did not pass: the last line of its traceback, or its signal."""
        if self.status != FAILED:
            return self.status
        lines = self.errors.strip().splitlines()
        if self.code and self.code > 128:
            return f"failed: killed by {_signal_name(self.code - 128)}"
        return f"failed: {lines[-1]}" if lines else f"failed: it ended with status {self.code} before its last line"


def run(program: str, limits: Limits = Limits(), unisolated: bool = False) -> Outcome:
    """Run Python source text, and return what became of it.

    Raise NoSandbox where the machine has no namespaces for it, unless `unisolated`: then the limits alone hold, and the
    program can write and use the network as this process can.
    """
    found = isolation()
    if not found.namespaces and not unisolated:
        raise NoSandbox(f"programs cannot be isolated on this machine: {found.why}")
    return _run(program, limits, found)


def run_all(programs: Sequence[str], limits: Limits = Limits(), workers: int = 2, unisolated: bool = False
            ) -> Iterator[Outcome]:
    """Yield the outcomes of programs in their order, of which `workers` run at a time."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda program: run(program, limits, unisolated), programs)


@cache
def isolation() -> Isolation:
    """Return what this machine isolates, found by trying: it does not change while a process runs."""
    why = "namespaces are of Linux"
    wanted = [Isolation(True, True), Isolation(True, False)] if os.geteuid() == 0 else [Isolation(True, True)]
    for each in wanted if sys.platform == "linux" else ():
        try:
            tried = _run("pass", Limits(seconds=_START_SECONDS), each)
            if tried.passed:
                return Isolation(each.namespaces, each.processes, why if each != wanted[0] else "")
            why = tried.reason
        except NoSandbox as error:
            why = str(error)
    return Isolation(False, False, why)


def _run(program: str, limits: Limits, isolation: Isolation) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, _pipe() as (read, write), \
            tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        settings = {
            "isolated": isolation.namespaces, "as_nobody": os.geteuid() == 0 and isolation.processes, "folder": folder,
            "memory_bytes": limits.memory_bytes, "processor_seconds": ceil(limits.seconds) + 1,
            "file_bytes": limits.file_bytes, "processes": limits.processes, "folder_bytes": limits.folder_bytes,
            "mark": write, "python": sys.executable,
            "interpreter": [os.path.realpath(each) for each in (sys.prefix, sys.base_prefix)]}
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_INSIDE), json.dumps(settings)], stdin=subprocess.PIPE, stdout=output,
            stderr=errors, pass_fds=(write,), start_new_session=True, close_fds=True, cwd="/", env={"LANG": "C.UTF-8"})
        marks, code = _follow(process, program.encode(errors="replace"), limits.seconds, read)
        seconds, printed, said = time.monotonic() - begin, _end_of(output), _end_of(errors)
        if not marks.startswith(STARTED):
            raise NoSandbox(said.strip().splitlines()[-1] if said.strip() else "a program could not be started")
        passed = code == 0 and marks.endswith(ENDED)
        return Outcome(TIMEOUT if code is None else PASSED if passed else FAILED, code, printed, said, seconds)


def _follow(process: subprocess.Popen, program: bytes, seconds: float, read: int) -> tuple[bytes, int | None]:
    """Give a process its program, and wait; return its marks, and its status, None where it was too slow.

    The clock runs from when the program itself begins.
    """
    try:
        try:
            process.stdin.write(program)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read the program, which its marks tell
        marks, deadline = b"", time.monotonic() + _START_SECONDS
        while not marks and process.poll() is None and time.monotonic() < deadline:
            marks = _read(read)
            time.sleep(0 if marks else 0.002)
        try:
            code = process.wait(seconds)
            code = 128 - code if code < 0 else code  # a program can kill its group, and with it the one that waits
        except subprocess.TimeoutExpired:
            code = None
        return marks + _read(read), code
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """End a process and its group; with namespaces that ends whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 64)
    except BlockingIOError:
        return b""


def _end_of(file: BinaryIO) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SHOWN))
    return file.read().decode(errors="replace")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
