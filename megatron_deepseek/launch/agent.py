"""A rank and torchrun's agent, the process that started it. An entry imports this first, so nothing here is slow."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def started_by_agent() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_agent() -> None:
    """Let this process end when its agent does, from now on and whatever it is doing. Do nothing without torchrun.

    An agent that is started again starts all its ranks again, and no rank may train twice at once. The kernel kills
    (SIGKILL) a rank whose agent's main thread is gone; a rank whose agent was gone before ends here with status 1.
    Elsewhere than on Linux the kernel does not, and the watch of runtime/failure.py ends the rank a second later.
    Torchrun reports Ctrl-C while a rank starts: the rank itself ends at once and in silence.
    """
    if not started_by_agent():
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent or is_orphan(parent):
        os._exit(1)


def is_orphan(parent: int) -> bool:
    """Return whether the agent that started this process is gone, so that `parent` only adopted it.

    torchrun starts each rank in a session of its own: the leader of a session is the agent's own child (and not a
    wrapper's), and an agent has torch loaded. Where the memory map cannot be read, as that of another user's process
    such as init, the command line decides: an agent's names Python. In doubt `parent` is the agent.
    """
    if os.getsid(0) != os.getpid() or parent == 0:
        return False
    process = Path(f"/proc/{parent}")
    try:
        try:
            return b"libtorch" not in (process / "maps").read_bytes()
        except PermissionError:
            command = (process / "cmdline").read_bytes()
            return command != b"" and not any(word in command for word in (b"python", b"torch"))
    except OSError:
        return False


def tell_agent(line: str) -> None:
    """Write `line` where torchrun's summary looks for this rank's traceback. Do nothing without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
