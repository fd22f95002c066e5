"""The types of argument values: each turns text into a value or says in a few words why it cannot."""

import ast
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

_MOST_LAYERS = 10_000
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _checked(convert: Callable, accepts: Callable, kind: str, demand: str) -> Callable:
    def value(text: str):
        try:
            result = convert(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no {kind}") from None
        if not accepts(result):
            raise ArgumentTypeError(f"{text} {demand}")
        return result

    value.__name__ = "N" if convert is int else "X"  # what --help calls it
    return value


positive_int = _checked(int, lambda v: v > 0, "whole number", "is not at least 1")
count = _checked(int, lambda v: v >= 0, "whole number", "is negative")
positive = _checked(float, lambda v: 0 < v < math.inf, "number", "is not a positive number")
non_negative = _checked(float, lambda v: 0 <= v < math.inf, "number", "is not a number from 0 up")
fraction = _checked(float, lambda v: 0 <= v <= 1, "number", "is not between 0 and 1")
beta = _checked(float, lambda v: 0 <= v < 1, "number", "is not from 0 up to, but not including, 1")


def path_text(text: str) -> str:
    """Return a path as it was typed. Refuse what an unset variable of a shell or of Python leaves in its place."""
    if text.strip() in ("", "None", "null"):
        raise ArgumentTypeError(f"{text!r} is no path; without one, leave the argument out")
    return text


def path(text: str) -> Path:
    return Path(path_text(text))


def split(text: str) -> str:
    """Parse Megatron's --split: up to three weights with commas, completed to three ("9,1" is "9,1,0").

    Quotes around them are left out, as Megatron-LM does: its llama3_8b script passes '99,1,0' with them.
    """
    parts = text.strip("'\"").split(",")
    weights = [non_negative(part.strip()) for part in parts]
    if len(weights) > 3 or not sum(weights) > 0:
        raise ArgumentTypeError(f"{text!r} is not one to three weights for train, valid and test")
    return ",".join(part.strip() for part in parts + ["0"] * (3 - len(parts)))


def layer_pattern(text: str) -> int | tuple[int, ...]:
    """Parse Megatron's --moe-layer-freq: N, or a list expression of 0 (dense) and 1 (experts): ([0]*3+[1]*58)."""
    if "[" not in text:
        return positive_int(text)
    try:
        pattern = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError):
        pattern = None
    if not isinstance(pattern, list) or not pattern or not set(pattern) <= {0, 1}:
        raise ArgumentTypeError(f"{text!r} is neither a number nor a list expression of 0 and 1 like ([0]*3+[1]*58)")
    return tuple(pattern)


def _evaluate(node: ast.expr):
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= _MOST_LAYERS:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(element) for element in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _evaluate(node.left), _evaluate(node.right)
        result = left + right if isinstance(node.op, ast.Add) else left * right
        if isinstance(result, list) and len(result) <= _MOST_LAYERS:
            return result
    raise ValueError("not a list expression")


def dense_and_frequency(pattern: int | tuple[int, ...], num_layers: int) -> tuple[int, int]:
    """Return (first_k_dense_replace, moe_layer_freq) that put experts where `pattern` does.

    Raise ValueError where none do.
    """
    if isinstance(pattern, int):
        return 0, pattern
    if len(pattern) != num_layers:
        raise ValueError(f"--moe-layer-freq describes {len(pattern)} layers, but --num-layers is {num_layers}")
    for dense in range(num_layers + 1):
        for frequency in range(1, num_layers + 1):
            if all(kind == (i >= dense and i % frequency == 0) for i, kind in enumerate(pattern)):
                return dense, frequency
    raise ValueError(f"--moe-layer-freq {list(pattern)} is not some dense layers, then every n-th layer with experts, "
                     f"which is what first_k_dense_replace and moe_layer_freq can express")


def size(text: str) -> int:
    """Return the bytes of "5GB", "500MB", "1GiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 1GiB")
    return max(int(float(match[1]) * _UNITS[match[2].upper()]), 1)
