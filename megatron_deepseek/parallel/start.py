"""Joining the job: which device this rank computes on, and the default process group."""

import ctypes
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.restarts import agent_store
from megatron_deepseek.torch_private import _set_pg_timeout, _world


def choose_device() -> torch.device:
    """This rank's CUDA GPU where the machine has GPUs, else the CPU.

    Raises ValueError if the node starts more ranks than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_size > torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node {local_size} ranks on a node with {torch.cuda.device_count()} GPUs; "
                         "set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU")
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Let glibc reuse the activations of the last step instead of returning them to the kernel.

    Its default maps and unmaps every tensor above 128 KiB to 32 MiB anew, and each page is zeroed at its first touch.
    Elsewhere than on glibc this does nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def join_job(device: torch.device, timeout_minutes: float) -> None:
    """The default process group: NCCL beside gloo on CUDA, gloo on CPU. Without a launcher, a group of one."""
    backend = "gloo"
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **_rendezvous())


def _rendezvous() -> dict:
    """Where the ranks find each other: a store of their own life under torchrun, else what the environment says."""
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    store = agent_store()
    if store is None:
        return {}
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def limit_waiting(timeout_minutes: float) -> None:
    """Give every process group the time-out of the default one; torch gives those made without one its own."""
    for group in list(_world.pg_map):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            _set_pg_timeout(timedelta(minutes=timeout_minutes), group)
