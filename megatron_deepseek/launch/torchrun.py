"""torchrun for the entries of this repository, which ends with a single line: tools/launch.py.

torchrun answers a rank's failure with its own traceback of 20 lines and a table, and Ctrl-C with another traceback; no
rank can prevent either. Here the command line is checked once, before torch is imported and any rank is started. Then
torchrun runs in this process, so that one line tells how it ended, and the status is that of the rank that failed.
"""

import argparse
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_deepseek.launch.ending import INTERRUPTED
from megatron_deepseek.launch.links import silence_limited
from megatron_deepseek.launch.signals import numbers_read

PROGRAM = "launch.py"
USAGE = f"""usage: {PROGRAM} [--dry-run] [--relaunch N] TORCHRUN_ARGUMENTS... ENTRY.py ARGUMENTS...

torchrun (whose arguments it takes: torchrun --help), with the checks before it starts and one line when it fails.
--dry-run     check the arguments as the ranks would, print the command, and start nothing
--relaunch N  start torchrun again, N times at most, when it has lost the other nodes"""
_COUNTED_BY_TORCHRUN = ("auto", "gpu", "cpu", "xpu")
_SHUTDOWN_SECONDS = "600"  # for the step and the save of the ranks after a signal; torchrun's default is 30
_LAST_SECONDS = 2.0  # for the last lines of the ranks after a second Ctrl-C
_PRINT_ANYWAY = ("--help", "-h", "--explain-layout")  # the entry answers these without ranks
_LATER_NODE_SECONDS = 5.0  # meanwhile srun --kill-on-bad-exit ends the other nodes, which would say the same


def main(argv: Sequence[str]) -> int:
    own, options, entry = split(argv)
    if not entry:
        print(USAGE, file=sys.stdout if {"-h", "--help"} & set(argv) else sys.stderr)
        return 0 if {"-h", "--help"} & set(argv) else 2
    if set(_PRINT_ANYWAY) & set(entry):
        return subprocess.run([sys.executable, *entry]).returncode
    problem = _problem(own, options, entry[0])
    if problem is not None:
        print(f"{PROGRAM}: error: {problem}", file=sys.stderr)
        return 2
    try:
        status = check(options, entry)
    except KeyboardInterrupt:
        return INTERRUPTED
    if own.dry_run and not status:
        print(shlex.join(["torchrun", *options, *entry]))
    if status or own.dry_run:
        return status
    status = launch([*options, *entry])
    if status is not None:
        return status
    left = int(own.relaunch) - 1
    if left < 0:
        return 1
    print(f"{PROGRAM}: beginning anew, {left} more times at most", file=sys.stderr, flush=True)
    again = ["--relaunch", str(left), *options, *entry]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *again])  # nothing of a lost store is left in the process


def _problem(own: argparse.Namespace, options: Sequence[str], entry: str) -> str | None:
    """Return a mistake in the command line that torchrun or Python would report in many lines, None without one."""
    if not own.relaunch.isdecimal():
        return f"--relaunch {own.relaunch} is not a whole number of times"
    local = value(options, "nproc-per-node", "1")
    if not local.isdecimal() and local not in _COUNTED_BY_TORCHRUN:
        return f"--nproc_per_node {local} is neither a number of processes nor one of {', '.join(_COUNTED_BY_TORCHRUN)}"
    if not os.path.isfile(entry):
        own = Path(__file__).resolve().parents[2] / os.path.basename(entry)
        return f"no file {entry} in {os.getcwd()}" + (f"; there is {own}" if own.is_file() else "")
    return None


def split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return the launcher's own options, torchrun's, and the entry (the first word that ends in .py) with its own."""
    place = next((i for i, word in enumerate(argv) if word.endswith(".py")), len(argv))
    parser = argparse.ArgumentParser(PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--relaunch", default="0")
    own, options = parser.parse_known_args(argv[:place])
    return own, options, list(argv[place:])


def check(options: Sequence[str], entry: Sequence[str]) -> int:
    """Return the status of the entry's --check-only on the ranks of `options`; 0 where only torchrun can count them."""
    local, nodes = value(options, "nproc-per-node", "1"), value(options, "nnodes", "1")
    if not (local.isdecimal() and nodes.isdecimal()):  # gpu, auto, 2:4
        return 0
    later = value(options, "node-rank", "0") != "0"
    environ = os.environ | {"WORLD_SIZE": str(int(local) * int(nodes)), "LOCAL_WORLD_SIZE": local}
    done = subprocess.run([sys.executable, *entry, "--check-only"], env=environ, stderr=subprocess.PIPE, text=True)
    if done.returncode and later:
        time.sleep(_LATER_NODE_SECONDS)
    sys.stderr.write(done.stderr)
    return done.returncode


def value(options: Sequence[str], name: str, default: str) -> str:
    """Return --`name` in torchrun's `options`, in which _ may stand for -, or in its environment variables."""
    found = os.environ.get("PET_" + name.replace("-", "_").upper(), default)
    for option, following in zip(options, [*options[1:], ""]):
        key, equals, given = option.partition("=")
        if key.startswith("--") and key[2:].replace("_", "-") == name:
            found = given if equals else following
    return found


def launch(argv: Sequence[str]) -> int | None:
    """Run torchrun here and return the status of the job, None if torchrun lost the other nodes, which may go on."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # 30 lines of addresses for each lost store
    try:
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousClosedError
    except KeyboardInterrupt:
        return _interrupted("SIGINT", INTERRUPTED)
    for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # reported below, in a line
    minutes = value(split(argv)[2], "distributed-timeout-minutes", "10")
    try:
        with numbers_read(_leave_on_second_interrupt), silence_limited(60 * float(minutes)):
            torchrun.main(list(argv))
        return 0
    except ChildFailedError as error:
        return failed(error.failures)
    except SignalException as signalled:
        return _interrupted(signalled.sigval.name, 128 + signalled.sigval)
    except KeyboardInterrupt:
        return _interrupted("SIGINT", INTERRUPTED)
    except (RendezvousClosedError, ValueError) as error:  # the job failed on another node; or arguments do not fit
        print(f"{PROGRAM}: error: torchrun: {_first_line(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"{PROGRAM}: error: torchrun lost the other nodes, or did not meet them: {_first_line(error)}",
              file=sys.stderr)
        return None


def _leave_on_second_interrupt(file: int) -> None:
    """Read signal numbers in a thread, and end this process after the second Ctrl-C.

    torchrun would wait once more for ranks that do not end. With this process they do (agent.py), even those that hang.
    """
    interrupts = 0
    while numbers := os.read(file, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            time.sleep(_LAST_SECONDS)
            os._exit(_interrupted("SIGINT", INTERRUPTED))


def _interrupted(name: str, status: int) -> int:
    print(f"{PROGRAM}: ended on {name}", file=sys.stderr)
    return status


def failed(failures: dict) -> int:
    """Print which rank failed first and how, unless it did so in a line itself, and return its status, as a shell's.

    Ranks that ended by SIGTERM were stopped by torchrun because of another one.
    """
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode == -15, item[1].timestamp))
    line = _words(first.message)
    if not _is_refusal(first.exitcode, line):
        print(f"{PROGRAM}: rank {rank} {line}", file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def _is_refusal(exitcode: int, line: str) -> bool:
    return exitcode == 2 and re.match(r"failed: \S+: error: ", line) is not None


def _words(message) -> str:
    """Return the words for an error file's entry, a dict, or for torch's own sentence where there is none."""
    if isinstance(message, dict):
        return f"failed: {message['extraInfo']['py_callstack']}"
    if message.startswith("Signal"):
        return f"was ended from outside: {message}"
    return "failed without a word; what it printed is above"


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
