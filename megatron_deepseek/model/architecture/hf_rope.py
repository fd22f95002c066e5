"""Rotary position embedding in config.json: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.

A key that other programs compute with and the layers here do not is refused by name, unless its value is the one that
changes nothing. The table was read off transformers 5.23 (modeling_rope_utils.py, all its rope types), vLLM's YaRN and
the original YaRN's code.
"""

from collections.abc import Mapping
from typing import Any

from megatron_deepseek.near_names import near_names

RopeFields = Mapping[str, Any]

_YARN_FIELDS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_READ = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", *_YARN_FIELDS)
# Mathematics that is not implemented, and the value with which it is the mathematics that is.
_NEUTRAL = {
    "attention_factor": None, "attn_factor": 1.0, "extrapolation_factor": 1.0, "truncate": True,
    "partial_rotary_factor": 1.0, "apply_yarn_scaling": True, "finetuned": True, "dynamic": False, "ntk_factor": None,
    "alpha": None, "short_factor": None, "long_factor": None, "short_mscale": None, "long_mscale": None,
    "low_freq_factor": None, "high_freq_factor": None, "mrope_section": None, "mrope_interleaved": False,
    "llama_4_scaling_beta": None}
_KINDS = ("linear", "dynamic", "yarn")
_OUTSIDE = "original_max_position_embeddings"  # some files say it beside the dictionary: it goes first in transformers
_NEAR = 0.8


def read_rope(fields: Mapping[str, Any], max_position_embeddings: int | None) -> tuple[float, dict | None]:
    """Return `rope_theta`, and RopeScaling's fields or None.

    `max_position_embeddings` is None where the file does not say it.
    """
    name, rope = _of(fields)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", *_KINDS):
        raise ValueError(f"{name} type {kind!r} is not one of default, {', '.join(_KINDS)}")
    _refuse_unimplemented(name, rope)
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    theta = 10000.0 if theta is None else _number(name, "rope_theta", theta)
    if theta <= 0:
        raise ValueError(f"rope_theta is {theta}; it must be positive")
    if kind == "default":
        if not (rope.get("rope_type") or rope.get("type")) and rope.get("factor", 1) not in (1, None):
            raise ValueError(f"{name} has factor {rope['factor']!r} and no type; {', '.join(_KINDS)} scale by it")
        return theta, None
    if rope.get("factor") is None:
        raise ValueError(f"{name} of type {kind!r} has no factor")
    original = fields.get(_OUTSIDE) or rope.get("original_max_position_embeddings") or max_position_embeddings
    if original is None or (kind == "dynamic" and max_position_embeddings is None):
        raise ValueError(f"max_position_embeddings is missing, which {name} of type {kind!r} is computed with")
    if not isinstance(original, int) or isinstance(original, bool):
        raise ValueError(f"{name} original_max_position_embeddings is {original!r}, which is no int")
    yarn = {key: _number(name, key, rope[key]) for key in _YARN_FIELDS if rope.get(key) is not None}
    return theta, {"kind": kind, "factor": _number(name, "factor", rope["factor"]),
                   "original_max_position_embeddings": original, **yarn}


def write_rope(config, fields: Mapping[str, Any] | None = None) -> dict:
    """Return a ModelConfig's RoPE in the dialect of `fields`, whose further keys stay; without `fields` as released."""
    name, given = _of(fields or {})
    more = {key: value for key, value in given.items() if key not in _READ}
    scaling, beside = _scaling(config), {}
    if fields and _OUTSIDE in fields and config.rope_scaling:
        beside = {_OUTSIDE: config.rope_scaling.original_max_position_embeddings}
    if fields is None or "rope_parameters" not in fields:
        return beside | {"rope_theta": config.rope_theta, "rope_scaling": scaling and more | scaling}
    scaling = scaling or {"type": "default"}
    theirs = {"rope_type": scaling.pop("type"), "rope_theta": config.rope_theta}
    return beside | {"rope_parameters": more | theirs | scaling}


def unknown_rope_keys(fields: Mapping[str, Any]) -> list[str]:
    """Return the keys that nothing here reads, as NAME.KEY."""
    name, rope = _of(fields)
    return [f"{name}.{key}" for key in rope if key not in _READ and key not in _NEUTRAL]


def _of(fields: Mapping[str, Any]) -> tuple[str, RopeFields]:
    """Return the key of the rotary embedding's dictionary in config.json, and the dictionary.

    As in transformers, rope_scaling goes first where there are both.
    """
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"{name} is {rope!r}, not an object")
        if rope:
            return name, rope
    return "rope_scaling", {}


def _refuse_unimplemented(name: str, rope: RopeFields) -> None:
    for key, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(f"{name} has {key} with parameters of its own, which is not supported: all layers here "
                             f"have the same")
        if key in _NEUTRAL and value is not None and value != _NEUTRAL[key]:
            raise ValueError(f"{name} {key} {value!r} is not supported" +
                             (f", only {_NEUTRAL[key]!r}" if _NEUTRAL[key] is not None else ""))
        near = near_names(key, (*_READ, *_NEUTRAL), _NEAR, 1)
        if key not in _READ and key not in _NEUTRAL and near:
            raise ValueError(f"{name} has {key}, which is unknown; did you mean {near[0]}?")


def _number(name: str, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name} {key} is {value!r}, which is no number")
    return float(value)


def _scaling(config) -> dict | None:
    """Return RopeScaling as a released file has it; what another kind than yarn does not use is left out."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    fields = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn" or scaling.original_max_position_embeddings != config.max_position_embeddings:
        fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "yarn":
        fields |= {key: getattr(scaling, key) for key in _YARN_FIELDS}
    elif scaling.mscale_all_dim:  # scales the softmax with every kind
        fields["mscale_all_dim"] = scaling.mscale_all_dim
    return fields
