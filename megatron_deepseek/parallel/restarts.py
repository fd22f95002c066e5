"""Restarts by torchrun (--max-restarts): after every start the ranks use keys of their own in the agent's store.

torchrun's agent keeps its key-value store when it restarts the ranks (torch 2.13; a comment there says otherwise), so a
rank that asks for the address of a peer may get that of a dead process. The number of restarts cannot tell old keys
from new ones: TORCHELASTIC_RESTART_COUNT counts on every node the restarts which that node caused. So at every start
the ranks agree on a new random name and prefix all their keys with it. A life is the time from one start to its end.
"""

import functools
import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_MEETING = timedelta(minutes=10)  # for the slowest rank's imports


def agent_store() -> dist.Store | None:
    """Return a new connection to the store of torchrun's agent, for this life's keys; None without an agent's store.

    The agent outlives every rank, and so does its store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.PrefixStore(_start_name(), _connect())


def start_name() -> str | None:
    """Return a name that all ranks of this start share and no other start has; None without an agent's store."""
    return _start_name() if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None


def job_name() -> str:
    """Return a name that all starts of this job share and no other job has, kept in the store of torchrun's agent."""
    name = uuid.uuid4().hex
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return name
    return _connect().compare_set("megatron_deepseek/job", "", name).decode()


def _connect() -> dist.Store:
    # A store on a dead host refuses the connection at once; the time-out is for one that is only slow.
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         timeout=timedelta(minutes=5), wait_for_workers=False)


@functools.cache
def _start_name() -> str:
    """Return the name of this start of the job."""
    return meet(_connect(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _MEETING)


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name that only the ranks that call this now know, whatever earlier starts left in `store`.

    Rank 0 proposes a name; the others sign it with a random word of their own; rank 0 publishes who signed. A rank that
    read an old proposal does not find its word there, and waits for another one. Raise TimeoutError.
    """
    word, wait = uuid.uuid4().hex, _Waiting(timeout)
    if rank == 0:
        signatures = [f"{word}/{other}" for other in range(1, world_size)]
        store.set("life", word)
        while signatures and not store.check(signatures):
            missing = [key.split("/")[1] for key in signatures if not store.check([key])]
            wait.a_little(f"ranks {', '.join(missing)} did not start")
        store.set(f"{word}/met", json.dumps([store.get(key).decode() for key in signatures]))
        return word
    while True:
        life = store.get("life").decode() if store.check(["life"]) else None
        if life is not None:
            store.set(f"{life}/{rank}", word)
            if store.check([f"{life}/met"]) and word in json.loads(store.get(f"{life}/met")):
                return life
        wait.a_little("rank 0 did not start")


class _Waiting:
    """Pauses that grow to half a second, until a deadline."""

    def __init__(self, timeout: timedelta):
        self.deadline, self.pause, self.timeout = time.monotonic() + timeout.total_seconds(), 0.01, timeout

    def a_little(self, problem: str) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"{problem} within {self.timeout.total_seconds() / 60:g} minutes")
        time.sleep(self.pause)
        self.pause = min(1.5 * self.pause, 0.5)
