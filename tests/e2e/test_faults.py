"""Ranks die at random points of training and saving; they are started again, and nothing of it shows at the end."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from forked import running_script
from workshop import REPOSITORY, run_entry

from megatron_deepseek.checkpoint.tracker import iterations, last_iteration
from megatron_deepseek.runtime.lock_holder import LOCK, Holder, read_holder


def drill(workshop, *arguments: str) -> str:
    """What the command printed; it says what went wrong, and with which seed."""
    job = run_entry("tests/e2e/drill.py", 1, ["--workshop", str(workshop.directory), "--layouts", "ep",
                                              "--saves", "async", "--iterations", "7", *arguments])
    assert job.status == 0, job.output
    return job.output


@pytest.mark.slow
def test_dies_at_every_stage_of_a_save(workshop):
    """In a rank's file, before it is on the disk, before the rename, between it and the tracker, and before a step."""
    stages = ("1:write:30", "0:fsync:3", "0:publish:1", "0:tracker:2", "1:step:2")
    assert "5 kills and 0 hardships in 1 jobs, 0 of which" in drill(workshop, "--die", *stages)


@pytest.mark.slow
def test_dies_at_random_and_torchrun_restarts(workshop):
    """By a seed of the clock, which the drill prints: `drill.py --first-seed N` does the same again."""
    assert ", 0 of which ended otherwise" in drill(workshop, "--torchrun", "--seeds", "1", "--deaths", "1")


def test_leaves_in_time_and_exports_at_the_end_alone(workshop):
    """--exit-duration-in-mins and --save-every-seconds (each step takes longer); the next start goes on and exports."""
    root, out = workshop.directory / "timed", workshop.directory / "timed-hf"
    arguments = workshop.arguments("timed", "--eval-iters", "0", "--save-hf", str(out), "--load", str(root))
    job = workshop.run(1, [*arguments, "--train-iters", "100000", "--exit-duration-in-mins", "0.04",
                           "--save-every-seconds", "0.001"])
    last = workshop.metrics("timed")[-1]["iteration"]
    assert f"leaving after iteration {last} as --exit-duration-in-mins says" in job.output, job.output
    assert iterations(root) == list(range(1, last + 1)) and last_iteration(root) == last
    assert job.status == 0 and f"{out} is not written after {last} of 100000 iterations" in job.output, job.output
    assert not out.exists()
    job = workshop.run(1, [*arguments, "--train-iters", str(last + 1)])
    assert job.status == 0 and f"exported {out}" in job.output, job.output


SUSPENDED = """
import os, signal
from megatron_deepseek.checkpoint.dcp import storage_writer as writer
from megatron_deepseek.runtime.save_lock import SaveLock

def check_then_stop(directory, listing, check=writer.check_sizes):
    damage = check(directory, listing)
    if directory.name == "iter_0000002.saving":
        os.kill(os.getpid(), signal.SIGSTOP)
    return damage

writer.check_sizes = check_then_stop
SaveLock.keep_beating = lambda self: None  # which would find it out, too, within ten seconds
import pretrain_deepseek
pretrain_deepseek.main()
"""


def test_a_run_that_comes_back_to_anothers_directory_publishes_nothing(workshop):
    """It was suspended right before its second checkpoint got its name; another run has begun that one meanwhile."""
    root = workshop.directory / "suspended"
    arguments = workshop.arguments("suspended", "--save-interval", "1", "--eval-iters", "0", "--train-iters", "4")
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED, *arguments], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]), process.communicate()
    other, theirs = Holder.here("another"), root / "iter_0000002.saving"
    shutil.rmtree(theirs)
    theirs.mkdir()
    (theirs / "__0_0.distcp").write_text("theirs")
    (root / LOCK).write_text(json.dumps(asdict(other)))
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (2, (
        f"pretrain_deepseek.py: error: --save {root} was taken over by {other} while this run was suspended or cut off "
        "from it: it stops here, and its last checkpoints may be the other's\n"))
    assert iterations(root) == [1] and last_iteration(root) == 1 and read_holder(root / LOCK) == other
    assert [path.read_text() for path in theirs.iterdir()] == ["theirs"]


def test_an_export_that_fails_costs_nothing(workshop):
    root, out = workshop.directory / "unexported", workshop.directory / "unexported-hf"
    out.with_name(out.name + ".incomplete").write_text("a file where a directory should be")
    job = workshop.run(1, workshop.arguments("unexported", "--train-iters", "1", "--eval-iters", "0",
                                             "--save-hf", str(out)))
    assert last_iteration(root) == 1
    line = job.output.strip().splitlines()[-1]
    assert job.status == 2 and line.startswith("pretrain_deepseek.py: error: ") and "Traceback" not in job.output
    assert "unexported-hf.incomplete" in line and "the training itself is saved" in line, line


def test_a_signal_to_one_rank_saves_and_ends_the_job(workshop):
    """SIGUSR1, as Slurm sends it: all ranks leave after the same step, with a checkpoint of it and status 0."""
    arguments = workshop.arguments("signalled", "--train-iters", "100000", "--eval-iters", "0")
    printed = workshop.directory / "signalled.txt"
    with running_script([str(REPOSITORY / "pretrain_deepseek.py"), *arguments], printed, printed, 2) as ranks:
        wait_for_steps(workshop, "signalled")
        os.kill(ranks[1].pid, signal.SIGUSR1)
        for rank in ranks:
            rank.join(60)
        output = printed.read_text()
        assert [rank.exitcode for rank in ranks] == [0, 0], output
    last = workshop.metrics("signalled")[-1]["iteration"]
    assert last_iteration(workshop.directory / "signalled") == last < 100000
    assert f"leaving after iteration {last}" in output and f"saved {workshop.directory}/signalled/iter_" in output


def wait_for_steps(workshop, save: str) -> None:
    metrics = workshop.directory / save / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)


def start_in_terminal(workshop, *arguments) -> tuple[subprocess.Popen, int]:
    """Two ranks by tools/launch.py, in the foreground of a terminal, and the terminal's other end."""
    ours, theirs = pty.openpty()
    process = workshop.start(2, workshop.arguments(*arguments), torchrun=(str(REPOSITORY / "tools" / "launch.py"),),
                             stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                             preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    return process, ours


def read_terminal(terminal: int) -> list[str]:
    """Its lines, until no process writes there any more."""
    text = b""
    try:
        while more := os.read(terminal, 65536):
            text += more
    except OSError:  # so Linux tells the end
        pass
    return text.decode().replace("\r", "").splitlines()


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves(workshop):
    """As a person does it. What is printed last is a line; no traceback, neither ours nor torchrun's."""
    process, terminal = start_in_terminal(workshop, "ctrl-c", "--train-iters", "100000", "--eval-iters", "0")
    wait_for_steps(workshop, "ctrl-c")
    os.write(terminal, b"\x03")
    lines = read_terminal(terminal)
    assert process.wait(60) == 130
    last = workshop.metrics("ctrl-c")[-1]["iteration"]
    assert last_iteration(workshop.directory / "ctrl-c") == last < 100000, lines
    assert lines[-1] == "launch.py: ended on SIGINT" and not any("Traceback" in line for line in lines), lines
    for line in ("Ctrl-C: this step ends, then the run saves and leaves", f"leaving after iteration {last} on SIGINT",
                 f"saved {workshop.directory}/ctrl-c/iter_"):
        assert sum(line in each for each in lines) == 1, lines


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once(workshop):
    process, terminal = start_in_terminal(workshop, "twice", "--train-iters", "100000", "--eval-iters", "0")
    wait_for_steps(workshop, "twice")
    os.kill(rank_process(process.pid, rank=1), signal.SIGSTOP)  # no step ends any more
    os.write(terminal, b"\x03")
    time.sleep(1)
    os.write(terminal, b"\x03")
    lines = read_terminal(terminal)
    assert process.wait(60) == 130
    assert lines[-1] == "launch.py: ended on SIGINT" and not any("Traceback" in line for line in lines), lines


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank among torchrun's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"rank {rank} is not running")
