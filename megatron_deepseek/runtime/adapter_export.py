"""--save-adapter: the adapter of the last checkpoint, which PEFT loads, in a directory of its own."""

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.checkpoint.adapter.export import ADAPTER
from megatron_deepseek.checkpoint.publishing import check_writable
from megatron_deepseek.checkpoint.tracker import find_iteration
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.user_errors import end_on_user_error
from megatron_deepseek.settings import RunSettings


def check_new_adapter(directory: Path) -> None:
    """Raise ValueError if no adapter could be written to `directory` at the end; an older adapter may be replaced."""
    if directory.exists() and (not directory.is_dir() or any(not path.name.startswith("adapter_")
                                                             for path in directory.iterdir())):
        raise ValueError(f"--save-adapter {directory} exists already and holds something else than an adapter")
    check_writable("--save-adapter", directory)


def export_adapter(run: RunSettings, iteration: int, report: Report) -> None:
    """Copy the adapter of the last checkpoint to --save-adapter, on rank 0; a run that leaves early does so too.

    The directory gets its name once it is whole.
    """
    if run.save_adapter is None or dist.get_rank() != 0:
        return
    aside = run.save_adapter.with_name(run.save_adapter.name + ".tmp")
    with end_on_user_error(f"; the adapter is in {run.save} all the same"):
        saved = find_iteration(run.save, iteration)
        if saved is None:
            raise ValueError(f"--save-adapter {run.save_adapter}: {run.save} has no checkpoint of {iteration}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(saved / ADAPTER, aside)
        shutil.rmtree(run.save_adapter, ignore_errors=True)
        os.rename(aside, run.save_adapter)
    report.message(f"wrote the adapter {run.save_adapter}")
