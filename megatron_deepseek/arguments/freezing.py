"""What --freeze-parameters leaves to train, known from the architecture alone."""

import re
from collections.abc import Sequence
from math import prod

from megatron_deepseek.checkpoint.convert.names import BIAS, native_places
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.frozen import is_frozen
from megatron_deepseek.near_names import near_names

_NEAR = 0.5  # a pattern names a kind of parameter, of which there are few
_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter as it is named here, with a layer's experts stacked; routers' biases are none."""
    return {place.whole: place.whole_shape for place in native_places(config) if not place.whole.endswith(BIAS)}


def matches_nothing(config: ModelConfig, patterns: Sequence[str]) -> str | None:
    """In words, the first pattern that no parameter has, and what there is like it; None if there is none such."""
    names = parameter_shapes(config)
    for pattern in patterns:
        if not any(is_frozen(name, [pattern]) for name in names):
            kinds = dict.fromkeys(_LAYER.sub("*", name) for name in names)
            near = near_names(_LAYER.sub("*", pattern), kinds, _NEAR)
            return f"{pattern} matches no parameter of this model" + (f"; it has {', '.join(near)}" if near else "")
    return None


def trains_nothing(config: ModelConfig, patterns: Sequence[str]) -> bool:
    return all(is_frozen(name, patterns) for name in parameter_shapes(config))


def describe_frozen(config: ModelConfig, patterns: Sequence[str]) -> str:
    """How much is trained and how much is not."""
    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    frozen = [size for name, size in sizes.items() if is_frozen(name, patterns)]
    return (f"--freeze-parameters: {sum(sizes.values()) - sum(frozen):,} parameters in {len(sizes) - len(frozen)} "
            f"tensors are trained, {sum(frozen):,} in {len(frozen)} are frozen")


def describe_resumed(trained: set[str], saved: set[str], steps: int) -> list[str]:
    """A line for parameters that are `trained` from here on and were not when moments of those `saved` were, and one
    for the other way round. `steps`: the updates that the checkpoint has behind it.
    """
    lines = []
    if new := sorted(trained - saved):
        lines.append(f"{_some(new)} trained from here on and had no moments in the checkpoint: these begin at zero and "
                     f"step 0, while those of others have {steps} steps behind them")
    if left := sorted(saved - trained):
        lines.append(f"{_some(left)} frozen from here on: the weights stay as they were loaded, the moments go")
    return lines


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} parameters, first {names[0]}, are"
