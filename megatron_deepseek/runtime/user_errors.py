"""Users' mistakes that show once ranks run: one line ends the job, whether all ranks find the mistake or one alone."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_deepseek.launch.agent import tell_agent
from megatron_deepseek.parallel.restarts import agent_store
from megatron_deepseek.runtime.failure import FailureClaim
from megatron_deepseek.runtime.lock_holder import Holder
from megatron_deepseek.runtime.save_lock import SaveLock

SILENT_SECONDS = 10.0  # the other ranks wait so long for torchrun to stop them, while one prints
FIRST_RANK_SECONDS = 1.0  # the other ranks give rank 0 so long to print what all of them have found


@contextmanager
def end_on_user_error(advice: str = "", lock: SaveLock | None = None) -> Iterator[None]:
    """End the job with status 2 on a ValueError or OSError inside.

    `advice` follows the error's text. `lock` is given up: nothing was written under it.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if lock is not None:
            lock.release()
        end_with_error(f"{error}{advice}")


def end_with_error(line: str) -> None:
    """End this rank with status 2. The first rank to claim the job's failure says `line`."""
    if int(os.environ.get("RANK", "0")):
        time.sleep(FIRST_RANK_SECONDS)
    line = f"pretrain_deepseek.py: error: {line}"
    if FailureClaim(agent_store()).is_first():
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(SILENT_SECONDS)
    tell_agent(line)
    os._exit(2)


def end_taken_over(save: Path, holder: Holder) -> None:
    """End this rank, since another run holds `save` now."""
    end_with_error(f"--save {save} was taken over by {holder} while this run was suspended or cut off from it: it "
                   "stops here, and its last checkpoints may be the other's")
