"""The end of a command: one line for a mistake that a user can mend, and the exit statuses that shells expect."""

import os
import sys
from collections.abc import Callable
from typing import TextIO

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE


def exit_status(program: str, body: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Return the status of `body()`; 2 after ValueError or OSError, 130 after Ctrl-C, with one line on stderr.

    Return 141 where nobody reads the output any more (`| head`): the command has not printed all, so it is no success.
    The buffer is written here: otherwise Python would meet the same error once more at its end, and print it.
    """
    try:
        status = _outcome(program, body, interrupted)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        silence(sys.stdout)
        return BROKEN_PIPE


def _outcome(program: str, body: Callable[[], int], interrupted: str) -> int:
    try:
        return body()
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"{program}: error: {_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as leaving:  # argparse's, after --help
        return leaving.code or 0


def _words(error: Exception) -> str:
    """Return the message of an error, of an OSError the file and what is wrong with it, without the number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def silence(stream: TextIO) -> None:
    """Send what is written to `stream` from now on to the null device, since its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
