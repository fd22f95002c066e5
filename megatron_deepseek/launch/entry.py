"""The end of an entry: a line for Ctrl-C, and no thread that is still in C++ when the interpreter is gone.

It imports the standard library only.
"""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from megatron_deepseek.launch.ending import INTERRUPTED


def run(program: str, main: Callable[[], None]) -> NoReturn:
    """Run `main` and end this process with its status."""
    try:
        main()
        status = 0
    except SystemExit as left:
        status = _status(left)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BaseException:
        traceback.print_exc()
        status = 1
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process as Python does, except that daemon threads which are still there do not see it.

    Such a thread (the watch of failures, which waits for an agent that does not answer) returns from C++ into an
    interpreter that is gone, and Python up to 3.13 ends it by an exception that C++ turns into an abort.
    """
    if any(thread.daemon for thread in threading.enumerate()):
        threading._shutdown()  # waits for the other threads, as Python does first; no public name
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    sys.exit(status)


def _status(left: SystemExit) -> int:
    """Return the status that Python would end with: 0 for None; 1 for what is no number, which is printed."""
    if left.code is None or isinstance(left.code, int):
        return left.code or 0
    print(left.code, file=sys.stderr)
    return 1
