"""Clients that abort, send what is no JSON, read slowly and flood: benchmarks/serve.py's, for some seconds."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "serve_pieces"))

from abuse import KINDS, Target, misbehave

pytestmark = pytest.mark.slow


def test_others_are_answered_and_nothing_is_left(served):
    """Whoever asks as they should gets a whole answer, and every kind of the others what is meant for it.

    Answers that are left would take minutes: nobody but their readers may have waited for them.
    """
    told, unasked = asyncio.run(misbehave(Target(served.port, "tiny", longest=64, abandoned=3500), seconds=8))
    assert not unasked, told
    assert all(told[kind] for kind in KINDS), told
    served.wait_until_idle()
    assert served.metric("vllm:kv_cache_usage_perc") == 0
