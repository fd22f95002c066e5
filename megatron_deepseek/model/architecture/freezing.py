"""The parameters that --freeze-parameters names, and what is left to train: known from the architecture alone.

A pattern is a wildcard over names: Hugging Face's, with experts stacked.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import parameters
from megatron_deepseek.near_names import near_names

_NEAR = 0.5  # a pattern names a kind of parameter, of which there are few
_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of `patterns` matches all of `name`; `*` stands for any text, dots included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every parameter by its name; the routers' biases, which are not trained, are none."""
    return {row.name: row.shape for row in parameters(config) if row.trained}


def matches_nothing(config: ModelConfig, patterns: Sequence[str]) -> str | None:
    """Return in words the first pattern that no parameter has, and what there is like it; None if all match."""
    names = parameter_shapes(config)
    for pattern in patterns:
        if not any(is_frozen(name, [pattern]) for name in names):
            kinds = dict.fromkeys(_LAYER.sub("*", name) for name in names)
            near = near_names(_LAYER.sub("*", pattern), kinds, _NEAR)
            return f"{pattern} matches no parameter of this model" + (f"; it has {', '.join(near)}" if near else "")
    return None


def trains_nothing(config: ModelConfig, patterns: Sequence[str]) -> bool:
    """Return whether `patterns` freeze every parameter."""
    return all(is_frozen(name, patterns) for name in parameter_shapes(config))


def trains_mtp_only(config: ModelConfig, patterns: Sequence[str]) -> bool:
    """Return whether all that `patterns` leave to train is in MTP modules, which not every objective trains."""
    rest = replace(config, num_nextn_predict_layers=0)
    return trains_nothing(rest, patterns) and not trains_nothing(config, patterns)


def describe_frozen(config: ModelConfig, patterns: Sequence[str]) -> str:
    """Return a line on how much is trained and how much is not."""
    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    frozen = [size for name, size in sizes.items() if is_frozen(name, patterns)]
    return (f"--freeze-parameters: {sum(sizes.values()) - sum(frozen):,} parameters in {len(sizes) - len(frozen)} "
            f"tensors are trained, {sum(frozen):,} in {len(frozen)} are frozen")
