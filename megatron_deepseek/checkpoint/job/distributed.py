"""Saving and loading checkpoints in a job: any layout can load what any other has saved.

Each saved iteration is a torch.distributed.checkpoint (DCP) directory.

    SAVE/iter_0000100/            DCP files: model.NAME, optimizer.exp_avg.NAME, optimizer.exp_avg_sq.NAME
                     /config.json   the architecture, in Hugging Face's form
                     /state.json    iteration, consumed samples, optimizer steps, sizes of past batches
                     /layout.json   the layout that wrote it, for people and the resharding tool
                     /arguments.json   the run's settings, so that the next start can say what has changed
                     /checksums.json   size and digest of every other file
    SAVE/latest_checkpointed_iteration.txt    names the last finished one

Tensors are saved by global shape and offset, under Hugging Face's parameter names, so nothing in the files depends on
the layout that wrote them.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager

from megatron_deepseek.checkpoint.convert.huggingface import open_huggingface
from megatron_deepseek.checkpoint.dcp.files import DcpDirectory, open_dcp
from megatron_deepseek.checkpoint.dcp.storage_reader import CheckpointReader
from megatron_deepseek.checkpoint.dcp.storage_writer import CheckpointWriter
from megatron_deepseek.checkpoint.job.hf_reader import HuggingFaceReader
from megatron_deepseek.checkpoint.job.state import MOMENTS, base_state, fill_copies, model_state, state_to_save
from megatron_deepseek.checkpoint.job.subset import Subset, late_parameters, set_steps
from megatron_deepseek.checkpoint.native import OPTIMIZER, WEIGHTS
from megatron_deepseek.checkpoint.tracker import is_huggingface, iteration_directory
from megatron_deepseek.checkpoint.train_state import TrainState, read_state
from megatron_deepseek.device import has_accelerator, synchronize
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.torch_private import StateDictStager

T = TypeVar("T")


def save(root: Path, state: TrainState, config: ModelConfig, stages: list[nn.Module],
         optimizer: torch.optim.Optimizer | None, keep_last: int | None = None,
         group: dist.ProcessGroup | None = None, notes: Mapping[str, Any] | None = None,
         still_mine: Callable[[], None] = lambda: None, complete: Callable[[Path], None] = lambda directory: None
         ) -> Path:
    """Write a checkpoint of `state.iteration`, make it the last one, and return its directory. Every rank calls it.

    `group` is a gloo group of all ranks, by default the default group. `notes`, `still_mine` and `complete` are as for
    CheckpointWriter. Raise on every rank what any rank raised, an OSError with errno ENOSPC if the disk is full; the
    checkpoints that were there are then as before.
    """
    try:
        dcp.save(state_to_save(stages, optimizer), process_group=group,
                 storage_writer=CheckpointWriter(root, state, config, keep_last, notes, still_mine, complete))
    except CheckpointException as error:
        raise first_failure(error) from None
    return iteration_directory(root, state.iteration)


class _KeptCopy(AsyncStager):
    """DCP's copier to memory, which keeps that memory for the next save. torch 2.11's DefaultStager works only once."""

    should_synchronize_after_execute = False

    def __init__(self):
        self._cuda = has_accelerator()
        self._copier = StateDictStager(pin_memory=self._cuda, share_memory=False)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        copy = self._copier.stage(state_dict, non_blocking=self._cuda)
        if self._cuda:
            synchronize()
        return copy

    def close(self) -> None:
        self._copier.close()


class BackgroundSaver:
    """Saves in a thread (DCP's async_save), so that training stops only while tensors are copied to memory.

    The memory is kept between saves, and pinned if there is CUDA. `group` must be a gloo group that nothing else uses,
    since the thread's collectives run while the job's own go on.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._stager = _KeptCopy()

    def begin(self, root: Path, state: TrainState, config: ModelConfig, stages: list[nn.Module],
              optimizer: torch.optim.Optimizer | None, keep_last: int | None = None,
              notes: Mapping[str, Any] | None = None, still_mine: Callable[[], None] = lambda: None,
              complete: Callable[[Path], None] = lambda directory: None) -> Future:
        """Start a save with the arguments of `save`, and return its future once everything is copied.

        Wait for the future before the next call. Its error is DCP's CheckpointException: see `first_failure`.
        """
        return dcp.async_save(state_to_save(stages, optimizer), process_group=self._group, async_stager=self._stager,
                              storage_writer=CheckpointWriter(root, state, config, keep_last, notes, still_mine,
                                                              complete))

    def close(self) -> None:
        self._stager.close()


def first_failure(error: BaseException) -> BaseException:
    """Return the error of the lowest rank in a CheckpointException, or `error` itself if it is another one.

    DCP's CheckpointException is a BaseException, which no `except Exception` catches.
    """
    if not isinstance(error, CheckpointException) or not error.failures:
        return error
    rank = min(error.failures)
    failure, _ = error.failures[rank]
    failure.add_note(f"on rank {rank}") if hasattr(failure, "add_note") else None
    return failure


def has_optimizer(directory: Path) -> bool:
    """Return whether a checkpoint has optimizer state; released weights, and those converted from them, have none."""
    if is_huggingface(directory):
        return False
    return any(name.startswith(OPTIMIZER) for name in DcpDirectory(directory).shapes)


def with_moments(directory: Path) -> set[str]:
    """Return the names of the parameters that a checkpoint has moments of."""
    prefix = f"{OPTIMIZER}{MOMENTS[0]}."
    return {name.removeprefix(prefix) for name in DcpDirectory(directory).shapes if name.startswith(prefix)}


def converted_moments(directory: Path, optimizer: torch.optim.Optimizer) -> list[str]:
    """Say which moments a checkpoint has in another dtype than `optimizer` keeps them in, a line for each.

    Loading widens exactly, and narrows by rounding to nearest, ties to even.
    """
    saved, own = DcpDirectory(directory).dtypes, next(iter(optimizer.state.values()), None)
    if own is None:  # the stages of this rank are empty
        return []
    dtypes = {moment: {dtype for name, dtype in saved.items() if name.startswith(f"{OPTIMIZER}{moment}.")}
              for moment in MOMENTS}
    return [f"{moment} was saved in {_names(dtypes[moment])} and is kept in {_names({own[moment].dtype})} from here on"
            for moment in MOMENTS if dtypes[moment] - {own[moment].dtype}]


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def load(directory: Path, stages: list[nn.Module], optimizer: torch.optim.Optimizer | None,
         new: Sequence[str] = (), dropped: Sequence[str] = (), base: bool = False
         ) -> TrainState:
    """Fill the stages, and the optimizer unless None, from any layout's checkpoint. Every rank calls it.

    Tensors saved in another dtype are converted (`converted_moments` says which). `new` has beginnings of the names of
    parameters that the checkpoint lacks; they keep the weights that they have, and `optimizer` must be None. `dropped`
    has those of parameters that the checkpoint holds and the model does without. With `base` the weights that adapters
    are beside are filled, and `optimizer` must be None.

    Which parameters are frozen may have changed since the save. A parameter that was frozen has no moments in the
    checkpoint: they stay zero, and its steps are counted from here on (`TrainState.late`). Moments of a parameter that
    is frozen now are not loaded.

    Raise ValueError if a tensor is missing, unknown or of another shape, so that nothing is dropped in silence. What
    any rank raises, all raise.
    """
    assert not (new or base) or optimizer is None
    new_prefixes = tuple(WEIGHTS + beginning for beginning in new)
    reader, train_state = together(lambda: _open(directory))
    saved = reader.read_metadata().state_dict_metadata
    subset = Subset.of(stages, saved) if optimizer is not None else None
    whole = base_state(stages) if base else state_to_save(stages, optimizer)
    state = {name: tensor for name, tensor in whole.items()
             if not name.startswith(new_prefixes) and not (subset and name in subset.absent)}
    everyone = _check_tensors(directory, reader, state, subset, tuple(WEIGHTS + beginning for beginning in dropped))
    _load(state, reader)
    fill_copies(stages, optimizer)
    if optimizer is not None:
        train_state = replace(train_state, late=late_parameters(train_state, everyone))
        set_steps(stages, optimizer, train_state)
    return train_state


def load_weights(directory: Path, stages: list[nn.Module]) -> None:
    """Fill the stages' tensors and ignore the rest of the checkpoint: a model may have no use for MTP modules."""
    without_mtp = not any(stage.stage.mtp for stage in stages)
    state, reader = model_state(stages), CheckpointReader(open_dcp(directory)) if not is_huggingface(directory) else \
        HuggingFaceReader(open_huggingface(directory, without_mtp))
    mismatch = _mismatch(directory, reader.read_metadata().state_dict_metadata, state)
    if mismatch is not None:
        raise ValueError(mismatch)
    _load(state, reader)
    fill_copies(stages, None)


def _open(directory: Path) -> tuple[dcp.StorageReader, TrainState]:
    if is_huggingface(directory):
        return HuggingFaceReader(open_huggingface(directory)), TrainState()
    return CheckpointReader(open_dcp(directory)), read_state(directory)


def together(work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank; raise ValueError on every rank if it failed on any.

    So no rank waits in a collective for one that has left. The message is the lowest failing rank's ValueError or
    OSError, and names that rank unless all failed.
    """
    found, error = None, None
    try:
        found = work()
    except (ValueError, OSError) as caught:
        error = f"{caught}"
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (error, socket.gethostname()))
    failed = [(rank, *each) for rank, each in enumerate(everyone) if each[0] is not None]
    if not failed:
        return found
    rank, message, host = failed[0]
    raise ValueError(message if len(failed) == len(everyone) else f"{message} (as rank {rank} on {host} sees it)")


def _load(state: dict[str, torch.Tensor], reader: dcp.StorageReader) -> None:
    try:
        dcp.load(state, storage_reader=reader)
    except CheckpointException as error:
        raise first_failure(error) from None


def _check_tensors(directory: Path, reader: dcp.StorageReader, state: dict[str, torch.Tensor],
                   subset: Subset | None, dropped: tuple[str, ...]) -> list[Subset | None]:
    """Return the `subset` of every rank, None if the optimizer is not loaded.

    Raise ValueError on every rank if on any rank a tensor of `state` is missing or of another shape in the checkpoint,
    or if the checkpoint has a tensor that no rank knows, but for those whose names begin as one of `dropped`.
    """
    saved = reader.read_metadata().state_dict_metadata
    others = reader.stored.others if isinstance(reader, CheckpointReader) else frozenset()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (list(state), _mismatch(directory, saved, state), subset))
    for _, mismatch, _ in everyone:
        if mismatch is not None:
            raise ValueError(mismatch)
    unknown = (set(saved) | others) - {name for names, _, _ in everyone for name in names}
    if subset is None:
        unknown = {name for name in unknown if not name.startswith((OPTIMIZER, *dropped))}
    else:
        unknown -= {name for _, _, of_rank in everyone for name in of_rank.left}
    if unknown:
        raise ValueError(f"{directory} has {len(unknown)} tensors that this model lacks, first {min(unknown)}")
    return [of_rank for _, _, of_rank in everyone]


def _mismatch(directory: Path, saved: dict, state: dict[str, torch.Tensor]) -> str | None:
    missing = sorted(set(state) - set(saved))
    if missing and all(name.startswith(OPTIMIZER) for name in missing):
        return (f"{directory} lacks {len(missing)} tensors of the optimizer, first {missing[0]}; --no-load-optim "
                "begins with fresh moments")
    if missing:
        return f"{directory} lacks {len(missing)} tensors of this model, first {missing[0]}"
    for name, tensor in state.items():
        if tuple(saved[name].size) != tuple(tensor.shape):
            return f"{directory}: {name} has shape {tuple(saved[name].size)}, this model's has {tuple(tensor.shape)}"
    return None
