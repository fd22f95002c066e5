"""Parameters that are not trained, named by wildcard patterns over Hugging Face's names, with experts stacked."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of `patterns` matches all of `name`; `*` stands for any text, dots included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def freeze(stages: Iterable["nn.Module"], patterns: Sequence[str]) -> None:
    """Turn off the gradients of parameters that `patterns` name, before FSDP takes them over and keeps them so.

    Only names decide, and they are the same in every layout, so the ranks and stages that share a parameter agree.
    """
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if is_frozen(name, patterns):
                parameter.requires_grad_(False)


def trained_parameters(stage: "nn.Module") -> Iterator[tuple[str, "nn.Parameter"]]:
    """Return the parameters that are not frozen, with their names."""
    return ((name, parameter) for name, parameter in stage.named_parameters() if parameter.requires_grad)
