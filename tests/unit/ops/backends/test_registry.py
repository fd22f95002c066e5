"""What the registry chooses, and what it says when it cannot."""

import re
from pathlib import Path

import pytest
import torch

from megatron_deepseek.ops import __main__ as table
from megatron_deepseek.ops.backends import registry
from megatron_deepseek.ops.backends.alternatives import torch_rms_norm
from megatron_deepseek.ops.backends.registry import CANDIDATES, Candidate, choose, parse_wishes, with_backends


def test_wishes():
    assert parse_wishes("") == {}
    assert parse_wishes("rms_norm=apex, attention=torch") == {"rms_norm": "apex", "attention": "torch"}
    all_torch = parse_wishes("all=torch,scaled_mm=csrc")
    assert all_torch == {"rms_norm": "torch", "norm_backward": "torch", "attention": "torch", "scaled_mm": "csrc",
                         "grouped_scaled_mm": "torch", "grouped_scaled_mm_wgrad": "torch", "attend": "torch",
                         "attend_backward": "torch"}
    assert set(parse_wishes("all=reference")) == set(CANDIDATES) - {"attention", "attend", "attend_backward"}


@pytest.mark.parametrize("text, message", [
    ("rms=apex", "no operator 'rms'"), ("rms_norm=apx", "no backend 'apx'"), ("all=apx", "no backend 'apx'")])
def test_wishes_that_name_nothing(text, message):
    with pytest.raises(ValueError, match=message):
        parse_wishes(text)


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def candidates(monkeypatch, *of_norm):
    monkeypatch.setattr(registry, "CANDIDATES", {"rms_norm": of_norm})


def test_the_first_that_can_be_had(a_gpu, monkeypatch):
    candidates(monkeypatch, Candidate("one", "alternatives:torch_rms_norm", lambda: "one is broken"),
               Candidate("two", "alternatives:torch_rms_norm", lambda: None),
               Candidate("reference", None, lambda: None))
    choice = choose("rms_norm", None)
    assert (choice.backend, choice.why, choice.function) == ("two", "one is broken", torch_rms_norm)
    assert choose("rms_norm", "reference").function is None
    with pytest.raises(ValueError, match="rms_norm=one, but one is broken"):
        choose("rms_norm", "one")


def test_without_a_gpu_everything_is_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {choose(operator, None).backend for operator in CANDIDATES} == {"reference"}


def test_every_function_exists():
    for operator, options in CANDIDATES.items():
        for candidate in options:
            assert candidate.function is None or callable(candidate.load()), operator


def test_every_operator_has_one_reference():
    files = [path for path in Path(registry.__file__).parents[1].rglob("*.py") if path.stem != "registry"]
    found = [name for path in files for name in re.findall(r'^@with_backends\("(\w+)"\)', path.read_text(), re.M)]
    assert sorted(found) == sorted(CANDIDATES)


def test_not_implemented_goes_to_the_reference(monkeypatch):
    """As for a dtype that a kernel does not take."""
    class Elsewhere:
        is_cuda = True

    asked = []
    choice = registry.Choice("rms_norm", "csrc", "", lambda *args: asked.append(args) or NotImplemented)
    monkeypatch.setattr(registry, "choices", lambda: {"rms_norm": choice})
    double = with_backends("rms_norm")(lambda x, y: 2 * y)
    assert double(Elsewhere(), 4) == 8 and len(asked) == 1
    assert double(torch.zeros(1), 4) == 8 and len(asked) == 1


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(table, "choices", registry.choices.__wrapped__)
    assert table.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(CANDIDATES)
    monkeypatch.setenv("MEGATRON_DEEPSEEK_OPS", "x=y")
    assert table.main([]) == 2
    assert capsys.readouterr().err.startswith(
        "python -m megatron_deepseek.ops: error: MEGATRON_DEEPSEEK_OPS: there is no operator 'x'")
