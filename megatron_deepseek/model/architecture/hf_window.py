"""Sliding windows in config.json, as transformers' Qwen2 and Qwen3 have them.

`use_sliding_window` turns `sliding_window` on, for the layers that `layer_types` names or, without that list, for those
from `max_window_layers` on. Released models have a window that is not turned on.
"""

from collections.abc import Mapping
from typing import Any

from megatron_deepseek.model.architecture.fields import FULL_LAYER, SLIDING_LAYER, ArchitectureFields

KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_FIRST_LAYER, _TOKENS = 28, 4096  # what transformers takes for a missing max_window_layers or sliding_window


def read_window(fields: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return ModelConfig's `sliding_window` and `layer_types`: None and () where no layer has a window."""
    turned_on = fields.get("use_sliding_window", False)
    if turned_on not in (True, False, None):
        raise ValueError(f"use_sliding_window is {turned_on!r}, which is no bool")
    window, types = fields.get("sliding_window", _TOKENS) if turned_on else None, fields.get("layer_types")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise ValueError(f"sliding_window is {window!r}, which is no int")
    if types is None:
        first = fields.get("max_window_layers", _FIRST_LAYER)
        if not isinstance(first, int) or isinstance(first, bool):
            raise ValueError(f"max_window_layers is {first!r}, which is no int")
        types = [FULL_LAYER if window is None or index < first else SLIDING_LAYER for index in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(f"layer_types {types!r} does not have one entry for each of {num_layers} layers")
    slides = SLIDING_LAYER in types
    if slides and window is None:
        raise ValueError(f"layer_types has {SLIDING_LAYER}, but use_sliding_window {turned_on!r} and sliding_window "
                         f"{fields.get('sliding_window')!r} say that no layer has a window")
    strange = [each for each in types if each not in (FULL_LAYER, SLIDING_LAYER)]
    if strange:
        raise ValueError(f"layer_types {strange[0]!r} is not one of {FULL_LAYER}, {SLIDING_LAYER}")
    return {"sliding_window": window if slides else None, "layer_types": tuple(types) if slides else ()}


def write_window(config: ArchitectureFields) -> dict[str, Any]:
    """Return the keys of a released file that say which layers of `config` have a window."""
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": config.sliding_window,
            "max_window_layers": config.layer_types.index(SLIDING_LAYER), "layer_types": list(config.layer_types)}
