"""--save-adapter: the adapter of the last checkpoint, which PEFT or vLLM loads, in a directory of its own."""

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.checkpoint.adapter.export import ADAPTER
from megatron_deepseek.checkpoint.adapter.for_vllm import describe, unapplied, write_for_vllm
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
    """Write the adapter of the last checkpoint to --save-adapter, on rank 0; a run that leaves early does so too.

    The directory gets its name once it is whole.
    """
    if run.save_adapter is None or dist.get_rank() != 0:
        return
    with end_on_user_error(f"; the adapter is in {run.save} all the same"):
        saved = find_iteration(run.save, iteration)
        if saved is None:
            raise ValueError(f"--save-adapter {run.save_adapter}: {run.save} has no checkpoint of {iteration}")
        left = unapplied(saved / ADAPTER) if run.adapter_for == "vllm" else []
        if left:
            report.message(f"WARNING: vLLM applies no adapter of {describe(left)}, so {run.save_adapter} is without "
                           f"them: tools/merge_lora.py --adapter {run.save} --adapter-for vllm --base BASE --save "
                           "NEW_BASE --save-adapter DIR merges them into a base, and nothing is lost")
        _write(saved / ADAPTER, run.save_adapter, without=bool(left))
    report.message(f"wrote the adapter {run.save_adapter}")


def _write(adapter: Path, directory: Path, without: bool) -> None:
    aside = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if without:
        write_for_vllm(adapter, aside)
    else:
        shutil.copytree(adapter, aside)
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(aside, directory)
