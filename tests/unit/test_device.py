"""device.py is the only file that speaks to the accelerator, and says to it what its functions promise."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megatron_deepseek import device

PACKAGE = Path(device.__file__).parent
GPU = torch.device("cuda", 3)


def test_no_other_file_names_torchs_module():
    """Neither as an attribute, nor as an import."""
    named = re.compile(r"torch\.cuda|from torch import [^\n]*\bcuda\b|getattr\(torch, .cuda")
    found = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if named.search(path.read_text())]
    assert found == ["device.py"]


def test_a_rank_has_the_device_of_its_number():
    assert device.accelerator_of_rank(3) == GPU
    assert device.is_accelerator(GPU)
    assert not device.is_accelerator(torch.device("cpu")) and not device.is_accelerator(torch.device("meta"))


@pytest.mark.parametrize("ours, theirs, arguments", [
    ("has_accelerator", "is_available", ()), ("is_accelerator_in_use", "is_initialized", ()),
    ("count_accelerators", "device_count", ()), ("compute_capability", "get_device_capability", ()),
    ("product_name", "get_device_name", (GPU,)), ("max_memory", "max_memory_allocated", (GPU,)),
    ("current_stream", "current_stream", ())])
def test_questions(monkeypatch, ours, theirs, arguments):
    asked, answer = [], object()
    monkeypatch.setattr(torch.cuda, theirs, lambda *given: asked.append(given) or answer)
    assert getattr(device, ours)(*arguments) is answer and asked == [arguments]


def test_only_an_accelerator_captures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert device.is_capturing(GPU)
    assert not device.is_capturing(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not device.is_capturing(GPU)


@pytest.mark.parametrize("ours, theirs, arguments", [
    ("bind_process", "set_device", (GPU,)), ("synchronize", "synchronize", ())])
def test_orders(monkeypatch, ours, theirs, arguments):
    told = []
    monkeypatch.setattr(torch.cuda, theirs, lambda *given: told.append(given))
    getattr(device, ours)(*arguments)
    assert told == [arguments]


@pytest.mark.parametrize("ours, theirs", [("on_stream", "stream"), ("on_device", "device")])
def test_blocks(monkeypatch, ours, theirs):
    what = object()
    monkeypatch.setattr(torch.cuda, theirs, nullcontext)
    with getattr(device, ours)(what) as inside:
        assert inside is what


def test_host_tensors_go_by_gloo_beside_the_accelerators_own_collectives():
    assert device.COLLECTIVES == "cpu:gloo,cuda:nccl"
