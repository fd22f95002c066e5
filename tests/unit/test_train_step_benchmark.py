"""benchmarks/train_step.py: shares of the rate of a GEMM, which is measured as steps are."""

import sys
from itertools import count
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import train_step


@pytest.mark.parametrize("clock, seconds", [("cpu", 1), ("wall", 100)])
def test_the_rate_of_a_gemm_is_by_the_clock_of_steps(monkeypatch, clock, seconds):
    """On a busy machine a process has one second of the processor in a hundred."""
    monkeypatch.setattr(train_step.time, "process_time", count(0, 1).__next__)
    monkeypatch.setattr(train_step.time, "perf_counter", count(0, 100).__next__)
    assert train_step.gemm_rate(torch.float32, clock, size=8) == 2 * 8**3 / seconds
