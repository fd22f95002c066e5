"""A rank joins its job: which device it computes on, and the default process group."""

import ctypes
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_deepseek.device import (
    COLLECTIVES,
    accelerator_of_rank,
    bind_process,
    count_accelerators,
    has_accelerator,
    is_accelerator,
)
from megatron_deepseek.parallel.restarts import agent_store
from megatron_deepseek.torch_private import _world, set_timeout


def choose_device() -> torch.device:
    """Return this rank's GPU where the machine has GPUs, else the CPU.

    Raise ValueError if the node starts more ranks than it has GPUs.
    """
    if not has_accelerator():
        return torch.device("cpu")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_size > count_accelerators():
        raise ValueError(f"--nproc_per_node {local_size} ranks on a node with {count_accelerators()} GPUs; "
                         "set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU")
    return accelerator_of_rank(local_rank)


def keep_freed_memory() -> None:
    """Let glibc reuse the activations of the last step instead of returning them to the kernel.

    By default glibc maps and unmaps memory for every tensor above a threshold of 128 KiB to 32 MiB, and the kernel
    zeroes each page at its first touch. With another C library this does nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def join_job(device: torch.device, timeout_minutes: float) -> None:
    """Make the default process group: NCCL and gloo on GPUs, gloo on CPUs. Without a launcher it has one rank."""
    backend = "gloo"
    if device.type == "cpu":
        keep_freed_memory()
    if is_accelerator(device):
        bind_process(device)
        backend = COLLECTIVES
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **_rendezvous())


def _rendezvous() -> dict:
    """Return where the ranks find each other: under torchrun a store for this restart alone, else what the environment
    says.
    """
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    store = agent_store()
    if store is None:
        return {}
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def limit_waiting(timeout_minutes: float) -> None:
    """Give every process group the time-out of the default one, in place of torch's own for groups made without one."""
    for group in list(_world.pg_map):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            set_timeout(timedelta(minutes=timeout_minutes), group)
