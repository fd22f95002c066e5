"""The runner itself: every way in which a job can end."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure


def sum_of_ranks() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def fail_on(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        raise KeyError("the cause")
    dist.barrier()


def die_on(dying_rank: int) -> None:
    if dist.get_rank() == dying_rank:
        os._exit(7)
    dist.barrier()


def never_join(absent_rank: int) -> None:
    if dist.get_rank() != absent_rank:
        dist.barrier()


def test_results_come_in_rank_order_for_worlds_of_any_size(ranks):
    assert ranks.run(8, sum_of_ranks) == [28.0] * 8
    assert ranks.run(3, sum_of_ranks) == [3.0] * 3
    assert ranks.run(3, dist.get_rank) == [0, 1, 2]


def test_the_failing_rank_speaks_and_nobody_waits(ranks):
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 2 of 4 failed:(?s:.*)KeyError: 'the cause'"):
        ranks.run(4, fail_on, 2)
    assert time.monotonic() - start < 200, "waited for the timeout"
    assert ranks.run(4, sum_of_ranks) == [6.0] * 4


def test_a_rank_that_dies_is_named(ranks):
    with pytest.raises(RankFailure, match="rank 1 died with exit code 7|Connection (closed|reset)"):
        ranks.run(2, die_on, 1)


def test_a_hang_ends_and_shows_where_ranks_were(ranks):
    with pytest.raises(RankFailure, match=r"ranks \[0, 2\] of 3(?s:.*)never_join"):
        ranks.run(3, never_join, 1, timeout=1)


def test_no_process_is_left(ranks):
    """A session of its own, since the one that runs here has its server still; its server imports torch alone."""
    script = ("import multiprocessing, ranks; from test_ranks import sum_of_ranks; ranks.PRELOAD[:] = ['torch']\n"
              "print(ranks.Ranks().run(2, sum_of_ranks), multiprocessing.active_children())")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Children that outlived the session would hold its standard output open, and the pipe would not end.
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=500, env=environment)
    assert run.stdout.strip() == "[1.0, 1.0] []", run.stderr
