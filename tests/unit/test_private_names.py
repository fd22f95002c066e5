"""Tests use public names alone, so that what is private may change without them.

ruff's SLF001 (pyproject.toml) sees `module._name`. This sees the private names of the package that tests import, and
those that they replace by a string.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = "megatron_deepseek"
PRIVATE = re.compile(r"_(?!_)\w+$")
REPLACING = {"setattr", "delattr", "_replace", "_method", "patch", "object"}


def private_names(source: str) -> Iterator[str]:
    """Yield the package's private names that `source` imports, or that a call replaces."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            yield from (alias.name for alias in node.names if PRIVATE.match(alias.name))
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            yield from (text for text in texts if called in REPLACING and PRIVATE.match(text.rpartition(".")[2]))


@pytest.mark.parametrize("source, found", [
    ("from megatron_deepseek.training.trainer import Trainer, _travel", ["_travel"]),
    ("from torch.utils import _pytree", []),
    ("monkeypatch.setattr(merge, '_copy', None)", ["_copy"]),
    ("monkeypatch.setattr('megatron_deepseek.data.merge._copy', None)", ["megatron_deepseek.data.merge._copy"]),
    ("monkeypatch.setattr(Router, '__init__', None)", [])])
def test_private_names_are_found(source, found):
    assert list(private_names(source)) == found


def test_no_test_uses_a_private_name():
    found = {path: names for path in TESTS.rglob("*.py") if (names := list(private_names(path.read_text())))}
    assert not found
