"""Subsets of a model's parameters to freeze, drawn: single ones, whole layers, all that lies below or above."""

import random
from fnmatch import fnmatchcase

from megatron_deepseek.checkpoint.convert.names import layer_of, native_places
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import BIAS


def names_of(model: ModelConfig) -> list[str]:
    return list(dict.fromkeys(place.whole for place in native_places(model) if not place.whole.endswith(BIAS)))


def all_but(model: ModelConfig, pattern: str) -> tuple[str, ...]:
    return tuple(name for name in names_of(model) if not fnmatchcase(name, pattern))


def drawn(model: ModelConfig, seed: int) -> tuple[str, ...]:
    """The names of a proper subset, none for seed 0. One seed draws another kind of subset for each model."""
    names = names_of(model)
    random_, frozen = random.Random(f"{seed} {names}"), []
    while seed and not 0 < len(frozen) < len(names):
        frozen = random_.choice((_each, _each, _layers, _below, _above, _all_but_few))(names, random_)
    return tuple(frozen)


def _each(names: list[str], random_: random.Random) -> list[str]:
    """Each parameter by itself, with one probability for all of them."""
    part = random_.choice((0.2, 0.5, 0.8))
    return [name for name in names if random_.random() < part]


def _layers(names: list[str], random_: random.Random) -> list[str]:
    """Each layer as a whole, embedding and head too."""
    layers = {_layer(name) for name in names}
    chosen = {layer for layer in sorted(layers, key=str) if random_.random() < 0.5}
    return [name for name in names if _layer(name) in chosen]


def _below(names: list[str], random_: random.Random) -> list[str]:
    """The embedding and the first layers: nothing below some point needs a gradient. Of that layer a part."""
    return names[:random_.randrange(1, len(names))]


def _above(names: list[str], random_: random.Random) -> list[str]:
    """All behind some point: gradients pass through what learns nothing."""
    return names[random_.randrange(1, len(names)):]


def _all_but_few(names: list[str], random_: random.Random) -> list[str]:
    """All but one or two parameters."""
    trained = random_.sample(names, random_.choice((1, 2)))
    return [name for name in names if name not in trained]


def _layer(name: str) -> int | str:
    layer = layer_of(name)
    return name if layer is None else layer
