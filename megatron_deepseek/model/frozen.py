"""Freezing a model: the parameters that patterns name (model/architecture/freezing.py) get no gradient."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_deepseek.model.architecture.freezing import is_frozen

if TYPE_CHECKING:
    from torch import nn


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
