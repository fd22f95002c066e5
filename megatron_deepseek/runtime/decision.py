"""Decides what a run begins from: nothing, a checkpoint of --save, or what --load names.

Rank 0 alone looks at what is there, and tells the others: ranks that each looked for themselves could disagree, where a
directory is not shared or a file system is slow to show what another node wrote.

    --save holds      --load is                           the run
    no checkpoint     not given, or the same directory    begins anew
    no checkpoint     another directory                   goes on from there; with --finetune, or from released
                                                          weights, begins at iteration 0
    a checkpoint      the same directory                  goes on, at --ckpt-step if that is given
    a checkpoint      what the run there began from       goes on with --save: --load was for the first start, and so
                                                          were --finetune, --ckpt-step and --no-load-optim
    a checkpoint      not given, or another directory     is refused; --overwrite begins anew and removes what is there

A checkpoint that this very job wrote before it was restarted takes precedence over everything: what the arguments ask
for was done at the job's first start.
"""

import os
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_deepseek.checkpoint.adapter.base import PLAIN, check_adapters, holds_adapters
from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.checkpoint.convert.mtp import module_prefixes
from megatron_deepseek.checkpoint.job.distributed import has_optimizer
from megatron_deepseek.checkpoint.loadable import check_directory, checkpoint_directory, stored_architecture
from megatron_deepseek.checkpoint.tracker import (
    TRACKER,
    REMOVING,
    begins_anew,
    is_huggingface,
    iterations,
    last_iteration,
    problem,
)
from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import HEAD, SCORE
from megatron_deepseek.runtime.lock_holder import LOCK, read_holder
from megatron_deepseek.runtime.expert_listener import PICTURE
from megatron_deepseek.runtime.expert_load import FILE as EXPERT_LOAD
from megatron_deepseek.runtime.manifest import FILE as MANIFEST
from megatron_deepseek.runtime.metrics import FILE_NAME as METRICS
from megatron_deepseek.runtime.recorded import Job, RecordedArguments, read_recorded
from megatron_deepseek.settings import RunSettings

SHARED_SECONDS = 30.0  # a network file system shows another node's new file so late: its clients cache directories

_RECORDS = (METRICS, EXPERT_LOAD, PICTURE, MANIFEST)  # files of a run beside its checkpoints
_FOLDERS = (DIRECTORY, "rollouts", "reference")  # the last two are those of reinforcement learning


@dataclass(frozen=True)
class Start:
    """The decision: what a run begins from.

    `load`: the checkpoint or released weights to load, None for fresh weights. `is_saved`: `load` is --save's last
    checkpoint. `weights_only`: load no moments. `finetune`: load no moments, and count from iteration 0. `new_modules`:
    prefixes of the names of the MTP modules that --init-mtp initialises, those that the checkpoint lacks, and the score
    of a reward model that begins from another; `dropped_modules`: of those that the checkpoint has and the model lacks,
    left behind by --mtp-num-layers 0, and that model's head.
    `origin`: the --load of the run's first start, None if it began from nothing. `overwrite`: what --save holds is
    removed before the first step. `lock`: the token of --save's lock. `before`: the arguments that the checkpoint
    records, where it is of the same run and has a record. `notes`: lines for the user.
    """

    load: Path | None = None
    is_saved: bool = False
    finetune: bool = False
    weights_only: bool = False
    new_modules: tuple[str, ...] = ()
    dropped_modules: tuple[str, ...] = ()
    origin: str | None = None
    overwrite: bool = False
    lock: str = ""
    before: RecordedArguments | None = None
    notes: tuple[str, ...] = ()


def decide(run: RunSettings, model: ModelConfig, job: Job, lock: str = "", lora: LoraSettings | None = None,
           form: str = PLAIN) -> Start:
    """Decide what the run begins from, on rank 0 while it holds the lock of --save, whose token is `lock`; `lora` are
    the adapters that it trains.

    Raise ValueError for what is refused or cannot be loaded.
    """
    start = replace(_decide(run, job), lock=lock)
    if start.load is None:
        return start
    check_adapters(start.load, lora, form)
    if lora is not None and not (start.finetune or holds_adapters(start.load)):
        raise ValueError(f"--load {start.load} holds whole weights: adapters beside them need another --save")
    own = run.save is not None and _same(start.load.parent, run.save)
    weights_alone = _has_weights_alone(start.load) or (not own and (start.finetune or start.weights_only))
    lines = check_directory(start.load, model, run.init_mtp, weights_alone, run.drop_mtp)
    stored = stored_architecture(start.load)
    new = module_prefixes(model, stored.num_nextn_predict_layers) if run.init_mtp else []
    dropped = module_prefixes(stored, model.num_nextn_predict_layers)
    if model.reward_head and not stored.reward_head:
        new, dropped = [*new, SCORE], [*dropped, HEAD]
    weights_only = start.finetune or start.weights_only or bool(new) or _has_weights_alone(start.load)
    return replace(start, weights_only=weights_only, new_modules=tuple(new), notes=(*start.notes, *lines),
                   dropped_modules=tuple(dropped),
                   before=None if start.finetune else read_recorded(start.load))


def _decide(run: RunSettings, job: Job) -> Start:
    if run.save is None or begins_anew(run.save):
        return _first_start(run)
    last = _recorded_last(run.save)
    if last is not None and last.job.is_earlier_start_of(job):
        return _continued(run, last, None)
    if run.overwrite:
        return replace(_first_start(run), overwrite=True)
    if run.load is not None and _same(run.load, run.save):
        return replace(_continued(run, last, run.ckpt_step), weights_only=run.no_load_optim)
    wrong = problem(run.save)
    if wrong is not None:
        raise ValueError(f"--save {run.save}: {wrong}; or --overwrite begins anew")
    if run.load is None or (last is not None and last.origin != _full(run.load)):
        raise ValueError(_other_run(run, last))
    note = (f"--save {run.save} holds a checkpoint of iteration {last_iteration(run.save)}, with which this run goes "
            f"on: --load {run.load} was for its first start")
    return replace(_continued(run, last, None), notes=(note,))


def _recorded_last(save: Path) -> RecordedArguments | None:
    """Return what the last checkpoint of `save` records of its run.

    None where there is nothing, or damage, which loading reports.
    """
    try:
        return read_recorded(checkpoint_directory(save))
    except ValueError:
        return None


def _first_start(run: RunSettings) -> Start:
    if run.save is not None and is_huggingface(run.save):
        raise ValueError(f"--save {run.save} is a Hugging Face model, which checkpoints would mix with: a run needs a "
                         "directory of its own")
    by_itself = run.save is not None and run.load is not None and _same(run.load, run.save) and run.ckpt_step is None
    if run.load is None or (by_itself and begins_anew(run.load)):
        return Start()
    directory = checkpoint_directory(run.load, run.ckpt_step)
    return Start(directory, finetune=run.finetune, weights_only=run.no_load_optim, origin=_full(run.load))


def _continued(run: RunSettings, last: RecordedArguments | None, step: int | None) -> Start:
    directory = checkpoint_directory(run.save, step)
    return Start(directory, is_saved=step in (None, last_iteration(run.save)),
                 origin=last.origin if last is not None else None)


def _other_run(run: RunSettings, last: RecordedArguments | None) -> str:
    """Write the message about a --save that holds a run which the arguments do not continue."""
    there = f"--save {run.save} holds a run of iteration {last_iteration(run.save)}"
    if run.load is not None:
        began = "nothing" if last.origin is None else f"--load {last.origin}"
        there += f" that began from {began}, not from --load {run.load}"
    return f"{there}: --load {run.save} goes on with it, --overwrite removes it and begins anew"


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _full(path: Path) -> str:
    return str(path.resolve())


def _has_weights_alone(directory: Path) -> bool:
    """Return whether these are released weights, converted or not: they never had moments, so none are missing."""
    return is_huggingface(directory) or (directory.name == "iter_0000000" and not has_optimizer(directory))


def share(start: Start | None, save: Path | None, seconds: float = SHARED_SECONDS) -> Start:
    """Return rank 0's decision on every rank; all ranks call this.

    Raise ValueError on every rank if one does not see, within `seconds`, the lock that rank 0 made in `save`: the
    shards that such a rank saves would be missing from every checkpoint.
    """
    told = [start, socket.gethostname()]
    dist.broadcast_object_list(told)
    start, first_host = told
    if save is None:
        return start
    seen: list = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (_sees(save / LOCK, start.lock, seconds), socket.gethostname()))
    blind = [(rank, host) for rank, (sees, host) in enumerate(seen) if not sees]
    if blind:
        (rank, host), more = blind[0], f" and {len(blind) - 1} other ranks do" if len(blind) > 1 else " does"
        raise ValueError(f"--save {save}: rank {rank} on {host}{more} not see what rank 0 on {first_host} writes "
                         "there. It must be one directory of a file system that all nodes share")
    return start


def _sees(lock: Path, token: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            holder = read_holder(lock)
        except OSError:
            holder = None
        if holder is not None and holder.token == token:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(0.5, seconds / 10))


def overwrite(root: Path) -> str:
    """Remove the checkpoints and records of an older run, for --overwrite. Return a line that says what was removed.

    The tracker goes first: a kill on the way leaves checkpoints that ask for --ckpt-step, or for --overwrite again.
    """
    there = iterations(root)
    (root / TRACKER).unlink(missing_ok=True)
    for directory in [path for path in root.glob("iter_*") if path.is_dir() and path.suffix != REMOVING]:
        os.rename(directory, directory.with_name(directory.name + REMOVING))
    for directory in root.glob(f"iter_*{REMOVING}"):
        shutil.rmtree(directory)
    for name in _RECORDS:
        (root / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(root / name, ignore_errors=True)
    return f"removed {len(there)} checkpoints of an older run, the last of iteration {there[-1]}, and its records " \
        f"from {root}" if there else f"removed an older run from {root}"
