"""Waiting for what rank 0 does before the job is joined, which may take hours: joining waits for a limited time."""

import time

from megatron_deepseek.parallel.restarts import agent_store

_CHECKED = "rank 0 has checked"  # a key of the agent's store
_POLL_SECONDS = 0.1


def tell_checked() -> None:
    """Tell the other ranks that rank 0 has checked."""
    store = agent_store()
    if store is not None:
        store.set(_CHECKED, "1")


def await_check() -> None:
    """Wait without end for rank 0, which torchrun ends all ranks without."""
    store = agent_store()
    while store is not None and not store.check([_CHECKED]):
        time.sleep(_POLL_SECONDS)
