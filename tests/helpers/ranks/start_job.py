"""What ranks do at a run's start where they do not see the same files; each function returns what its rank would print,
or the error that it would end with."""

import contextlib
import io
import os
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.runtime import user_errors
from megatron_deepseek.runtime.decision import Start, share
from megatron_deepseek.runtime.save_lock import SaveLock
from megatron_deepseek.runtime.user_errors import end_on_user_error


def share_a_directory(root: Path, same: bool) -> tuple[str, str]:
    """Of each rank its own, or one for all. The token of the lock that it was told of, or the error."""
    save = root if same else root / str(dist.get_rank())
    start = None
    if dist.get_rank() == 0:
        lock = SaveLock(save, "job", print, print)
        lock.acquire()
        start = Start(lock=lock.me.token)
    save.mkdir(exist_ok=True)
    try:
        return "", share(start, save, seconds=0.5).lock
    except ValueError as error:
        return str(error), ""


def refused(failing: tuple[int, ...]) -> tuple[str, int]:
    """What this rank prints and its exit status, where ranks of `failing` meet an error."""
    user_errors.FIRST_RANK_SECONDS, user_errors.SILENT_SECONDS = 0.5, 0.0
    status, printed = [], io.StringIO()
    real, os._exit = os._exit, status.append
    with contextlib.redirect_stderr(printed), end_on_user_error():
        if dist.get_rank() in failing:
            raise OSError(5, "Input/output error", f"/file of rank {dist.get_rank()}")
    os._exit = real
    return printed.getvalue(), status[0] if status else 0


def verify_elsewhere(root: Path) -> list[str]:
    """Rank 1 looks into an empty directory, as on a node of its own."""
    directory = root if dist.get_rank() == 0 else root / "elsewhere"
    try:
        return [str(each) for each in verify(directory)]
    except ValueError as error:
        return [str(error)]
