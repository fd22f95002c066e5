"""Ranks of one life find each other at a store that remembers earlier ones."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_deepseek.parallel.restarts import meet

SOON = timedelta(seconds=20)


def live(store, ranks, world_size, order=lambda rank: 0.0) -> dict[int, str]:
    """The names that `ranks` come to, each calling after `order(rank)` seconds."""
    names: dict[int, str] = {}

    def call(rank):
        threading.Event().wait(order(rank))
        names[rank] = meet(store, rank, world_size, SOON)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_life_has_a_name_of_its_own():
    """Also where rank 0 comes last, and the others find what the life before agreed on."""
    store, seen = dist.HashStore(), set()
    for order in (lambda rank: 0.0, lambda rank: 0.1 * rank, lambda rank: 0.1 * (3 - rank)):
        names = live(store, range(4), 4, order)
        assert len(names) == 4 and len(set(names.values())) == 1
        seen |= set(names.values())
    assert len(seen) == 3


def test_a_life_that_ended_while_meeting_is_forgotten():
    """Rank 0 proposed and rank 1 signed, rank 2 never came; then all start again."""
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match="ranks 1, 2 did not start within"):
        meet(store, 0, 3, timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match="rank 0 did not start within"):
        meet(store, 1, 3, timedelta(seconds=0.2))
    names = live(store, range(3), 3, lambda rank: 0.1 * (2 - rank))
    assert len(set(names.values())) == 1


def test_one_rank_meets_nobody():
    assert meet(dist.HashStore(), 0, 1, SOON)
