"""The trace of a rank holds the steps asked for, no more."""

import gzip
import json

import pytest
import torch

from megatron_deepseek.runtime.profile import check_profile, profiler
from megatron_deepseek.settings import RunSettings


def marks(path):
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("train step")})


def train(run, steps):
    with profiler(run, rank=3) as active:
        for step in range(steps):
            with torch.profiler.record_function(f"train step {step}"):
                torch.ones(4) @ torch.ones(4)
            active.step()


@pytest.mark.parametrize("start, end, steps", [(2, 4, 6), (0, 2, 3), (2, 4, 3)])
def test_traces_the_steps_asked_for(tmp_path, start, end, steps):
    """Also when the run ends first: then what there was."""
    train(RunSettings(10, save=tmp_path, profile=True, profile_step_start=start, profile_step_end=end), steps)
    trace = tmp_path / "profile" / f"rank_00003_steps_{start}-{end}.json.gz"
    assert marks(trace) == [f"train step {step}" for step in range(start, min(end, steps))]


def test_writes_nothing_unasked(tmp_path):
    train(RunSettings(10, save=tmp_path, profile_step_start=0, profile_step_end=1), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run, words", [
    (RunSettings(10, profile=True), "save"),
    (RunSettings(10, save="x", profile=True, profile_step_start=5, profile_step_end=5),
     "profile_step_start 5 .* profile_step_end 5")])
def test_refuses_a_profile_of_nothing(run, words):
    with pytest.raises(ValueError, match=words):
        check_profile(run)
