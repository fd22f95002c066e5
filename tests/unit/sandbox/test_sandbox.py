"""The sandbox: programs that try to get out of it, and what becomes of them."""

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from megatron_deepseek.sandbox import run as sandbox
from megatron_deepseek.sandbox.run import FAILED, TIMEOUT, Isolation, Limits, NoSandbox, isolation, run, run_all

QUICK = Limits(seconds=10, memory_bytes=256 * 2**20)
needs_namespaces = pytest.mark.skipif(not isolation().namespaces, reason=f"no namespaces: {isolation().why}")


def try_to(program: str, limits: Limits = QUICK):
    return run(program, limits, unisolated=True)


def test_a_program_passes_that_reaches_its_end():
    outcome = try_to("print(6 * 7)")
    assert (outcome.passed, outcome.output, outcome.code, outcome.reason) == (True, "42\n", 0, "passed")


@pytest.mark.parametrize("program, reason", [
    ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
    ("import sys; sys.exit(0)", "failed: it ended with status 0 before its last line"),
    ("import os; os._exit(0)", "failed: it ended with status 0 before its last line"),
    ("def f(:", "failed: SyntaxError: invalid syntax"),
    ("import ctypes; ctypes.string_at(0)", "failed: killed by SIGSEGV"),
    ("import signal, time; signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(30)", "failed: killed by SIGALRM"),
    ("x = bytearray(10**9)", "failed: MemoryError"),
    ("open('big', 'w').write('x' * 2**21)", "failed: OSError: [Errno 27] File too large")])
def test_why_a_program_fails(program, reason):
    outcome = try_to(program)
    assert outcome.status == FAILED and outcome.reason == reason


def test_what_is_printed_without_end_is_cut():
    outcome = try_to("while True: print('x' * 1000)")
    assert outcome.status == FAILED and len(outcome.output) <= 4096


def test_a_program_that_hangs_is_killed():
    begin = time.monotonic()
    outcome = try_to("while True: pass", Limits(seconds=0.3))
    assert (outcome.status, outcome.code, outcome.reason) == (TIMEOUT, None, "timed out")
    assert time.monotonic() - begin < 30


@needs_namespaces
def test_no_network():
    """Not even that of this machine, on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        socket.create_connection(server.getsockname(), 5).close()
        assert run(program, QUICK).reason.startswith("failed: OSError: [Errno 101]")


@needs_namespaces
def test_no_file_outside_its_folder():
    """Though everyone may write there."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        kept, new = Path(name, "kept"), Path(name, "new")
        kept.write_text("as it was")
        os.chmod(kept, 0o666)
        for each in (f"open({str(kept)!r}, 'w')", f"open({str(new)!r}, 'w')", f"import os; os.remove({str(kept)!r})"):
            assert "Read-only file system" in run(each, QUICK).reason
        assert kept.read_text() == "as it was" and [*Path(name).iterdir()] == [kept]
    own = run("open('own', 'w').write('mine'); print(open('own').read(), end='')", QUICK)
    assert own.output == "mine" and not Path("own").exists()


@needs_namespaces
def test_no_other_process_is_seen_or_stays():
    """A child that leaves the session would live on; with its namespace it ends, whose process 1 started the program.
    """
    mark = f"left-over-{os.getpid()}"
    outcome = run(f"import os, time\nprint(os.getpid(), os.getppid(), flush=True)\nif not os.fork():\n    os.setsid()\n"
                  f"    os.execvp('sleep', ['sleep', '300', {mark!r}])\nwhile True: time.sleep(1)", Limits(seconds=0.5))
    assert outcome.status == TIMEOUT and outcome.output == "2 1\n"
    assert not [each for each in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read(each)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(not isolation().processes, reason=f"processes are not limited: {isolation().why}")
def test_a_fork_bomb_has_no_more_processes_than_it_may():
    program = """
import os, time
made = 0
try:
    while True:
        if not os.fork():
            time.sleep(60)
        made += 1
except BlockingIOError:
    print(made)
"""
    outcome = run(program, Limits(seconds=20, processes=8))
    assert outcome.passed and 3 < int(outcome.output) < 8


@needs_namespaces
def test_nobody_gains_privileges():
    outcome = run("import os\nprint(os.getuid())\nos.setuid(0)", QUICK)
    assert (outcome.reason.startswith("failed: ") and outcome.output != "0\n") or os.getuid() != 0


def test_outcomes_come_in_the_order_of_the_programs():
    programs = ["import time; time.sleep(0.2); print(0)", "print(1)", "1 / 0"]
    found = list(run_all(programs, QUICK, workers=2, unisolated=True))
    assert [each.output for each in found] == ["0\n", "1\n", ""]
    assert found[2].reason == "failed: ZeroDivisionError: division by zero"


def test_without_namespaces_nothing_runs_unless_told(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(False, False, "unshare: Operation not permitted"))
    with pytest.raises(NoSandbox, match="cannot be isolated on this machine: unshare: Operation not permitted"):
        run("print(1)", QUICK)
    assert run("print(1)", QUICK, unisolated=True).passed


def test_limits_are_positive():
    with pytest.raises(ValueError, match="seconds is 0; it must be greater than 0"):
        Limits(seconds=0)
