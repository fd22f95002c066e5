"""How the commands end: one line for what a user can mend, and the statuses that shells expect."""

import os
import sys
from collections.abc import Callable

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE


def exit_status(program: str, body: Callable[[], int], interrupted: str = "interrupted") -> int:
    """What `body` returns; 2 after ValueError or OSError, 130 after Ctrl-C, with one line on stderr.

    141 where nobody reads the output any more (`| head`): what was not printed was not said, so it is no success.
    """
    try:
        return body()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
