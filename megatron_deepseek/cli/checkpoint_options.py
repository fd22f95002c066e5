"""What the commands on checkpoints have in common: each process's share of the work, and the progress bar."""

import sys
from collections.abc import Mapping

from tqdm import tqdm

from megatron_deepseek.checkpoint.building import DirectoryBuild, Share, build_directory


def share_of(environ: Mapping[str, str], workers: int) -> Share:
    """Return this process's share of the work: all of it, or under torchrun that of its rank."""
    rank, world_size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    return Share(workers, rank, world_size, _start(environ) if world_size > 1 else "0")


def _start(environ: Mapping[str, str]) -> str:
    """Name this start of a job on several ranks.

    Under a restart torchrun's own variables stay the same, so its name is taken from parallel/restarts.py if there is
    one.
    """
    from megatron_deepseek.parallel.restarts import start_name  # imports torch

    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return start_name() or "-".join(environ.get(name, "0") for name in names)


def progress(total: int | None, hidden: bool = False) -> tqdm:
    """Return a progress bar that counts bytes, on stderr."""
    return tqdm(total=total, unit="B", unit_scale=True, disable=hidden, mininterval=0.5)


def build_with_progress(build: DirectoryBuild, share: Share) -> None:
    """Run `build_directory` with a progress bar on rank 0, without a total if other ranks work too."""
    total = build.nbytes + build.check_bytes if share.world_size == 1 else None
    with progress(total, hidden=share.rank > 0) as bar:
        build_directory(build, share, bar.update, lambda text: print(text, file=sys.stderr))
