"""What asks a run to save or to leave: signals, and the first rank's clock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deepseek.runtime import interruptions
from megatron_deepseek.runtime.interruptions import Interruptions
from megatron_deepseek.settings import RunSettings
from megatron_deepseek.training.trainer import StopFlags


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `clock[0]` says."""
    now = [1000.0]
    monkeypatch.setattr(interruptions.time, "monotonic", lambda: now[0])
    return now


def test_time_is_up_on_the_first_rank_alone(clock):
    run = RunSettings(10, exit_duration_in_mins=2)
    first, other = (Interruptions(run, is_first, begun=990.0) for is_first in (True, False))
    clock[0] = 990 + 119
    assert first.stop_flags() == other.stop_flags() == StopFlags()
    clock[0] = 990 + 120
    assert first.stop_flags() == StopFlags(leave=True) and other.stop_flags() == StopFlags()
    assert "--exit-duration-in-mins" in first.reason() and "another rank" in other.reason()


def test_saves_by_the_clock_from_the_last_save(clock):
    watch = Interruptions(RunSettings(10, save=Path("x"), save_every_seconds=60), True, begun=0.0)
    clock[0] += 59
    assert watch.stop_flags() == StopFlags()
    clock[0] += 1
    assert watch.stop_flags() == StopFlags(save=True)
    watch.saved()
    assert watch.stop_flags() == StopFlags()
    clock[0] += 60
    assert watch.stop_flags() == StopFlags(save=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_note_while_training_and_what_it_was_after(number):
    received = []
    before = signal.signal(number, lambda *args: received.append(args[0]))
    try:
        watch = Interruptions(RunSettings(10), False, 0.0)
        with watch.handling():
            assert watch.stop_flags() == StopFlags()
            signal.raise_signal(number)
            assert watch.stop_flags() == StopFlags(leave=True) and watch.reason() == f"on {number.name}"
        assert received == []
        signal.raise_signal(number)
        assert received == [number]
    finally:
        signal.signal(number, before)


def test_a_signal_takes_effect_when_the_run_fails():
    """torchrun tells the ranks that lost a peer to end: they must, at once, and as of that signal."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *args: received.append(args[0]))
    try:
        watch = Interruptions(RunSettings(10), False, 0.0)
        with pytest.raises(RuntimeError), watch.handling():
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("Connection closed by peer")
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


STUCK = """
import ctypes, signal, sys
from pathlib import Path
from megatron_deepseek.runtime.interruptions import Interruptions
from megatron_deepseek.settings import RunSettings

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
with Interruptions(RunSettings(10, save=Path("x")), True, 0.0).handling():
    print("ready", flush=True)
    ctypes.CDLL(None).pause()   # each signal ends one; Python's handlers do not run in between
    ctypes.CDLL(None).sleep(600)
    ctypes.CDLL(None).sleep(600)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_twice_leaves_at_once(second):
    """Where the main thread sits in C; torchrun passes on the second one as SIGTERM."""
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    assert first == "Ctrl-C: this step ends, then the run saves and leaves; once more: it leaves at once\n"
    assert process.poll() is None
    process.send_signal(second)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and "leaving at once" in rest and rest.count("\n") == 1


def test_an_ignored_ctrl_c_stays_ignored():
    """As of a command that a script started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruptions(RunSettings(10), False, 0.0).handling():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
