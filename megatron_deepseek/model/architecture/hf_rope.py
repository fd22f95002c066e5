"""Rotary position embedding in config.json: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.

A key that other programs compute with and the layers here do not is refused by name, unless its value is the one that
changes nothing. The table was read off transformers 5.23 (modeling_rope_utils.py, all its rope types), vLLM's YaRN and
the original YaRN's code.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_deepseek.model.architecture.fields import GROUPED
from megatron_deepseek.model.architecture.rope_scaling import ROPE_KINDS
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
# What grouped-query attention reads beside that, by the kind of scaling; None for every kind.
_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor")
_GROUPED_READ = {"partial_rotary_factor": None, "attention_factor": "yarn", **dict.fromkeys(_LLAMA3_FIELDS, "llama3")}
_LATENT_KINDS = tuple(kind for kind in ROPE_KINDS if kind != "llama3")
_NO_MSCALES = {"mscale": 1.0, "mscale_all_dim": 0.0}
_OUTSIDE = "original_max_position_embeddings"  # some files say it beside the dictionary: it goes first in transformers
_NEAR = 0.8


def read_rope(fields: Mapping[str, Any], max_position_embeddings: int | None, attention: str) -> dict[str, Any]:
    """Return ModelConfig's rotary fields, `rope_scaling` as RopeScaling's fields or None.

    `max_position_embeddings` is None where the file does not say it; `attention` is that of its family.
    """
    name, rope = _of(fields)
    kind, kinds = rope.get("rope_type") or rope.get("type") or "default", ROPE_KINDS
    if attention != GROUPED:
        kinds = _LATENT_KINDS
    if kind not in ("default", *kinds):
        raise ValueError(f"{name} type {kind!r} is not one of default, {', '.join(kinds)}")
    more = [key for key, of in _GROUPED_READ.items() if attention == GROUPED and of in (None, kind)]
    _refuse_unimplemented(name, rope, more)
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    theta = 10000.0 if theta is None else _number(name, "rope_theta", theta)
    if theta <= 0:
        raise ValueError(f"rope_theta is {theta}; it must be positive")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else _number(name, "partial_rotary_factor", partial)
    scaling = _read_scaling(name, kind, rope, fields, max_position_embeddings)
    if scaling and attention == GROUPED:
        scaling |= _grouped_query_scaling(name, kind, rope, scaling)
    return {"rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": partial}


def _read_scaling(name: str, kind: str, rope: RopeFields, fields: Mapping[str, Any],
                  max_position_embeddings: int | None) -> dict | None:
    if kind == "default":
        if not (rope.get("rope_type") or rope.get("type")) and rope.get("factor", 1) not in (1, None):
            raise ValueError(f"{name} has factor {rope['factor']!r} and no type; {', '.join(ROPE_KINDS)} scale by it")
        return None
    if rope.get("factor") is None:
        raise ValueError(f"{name} of type {kind!r} has no factor")
    original = fields.get(_OUTSIDE) or rope.get("original_max_position_embeddings") or max_position_embeddings
    if original is None or (kind == "dynamic" and max_position_embeddings is None):
        raise ValueError(f"max_position_embeddings is missing, which {name} of type {kind!r} is computed with")
    if not isinstance(original, int) or isinstance(original, bool):
        raise ValueError(f"{name} original_max_position_embeddings is {original!r}, which is no int")
    yarn = {key: _number(name, key, rope[key]) for key in _YARN_FIELDS if rope.get(key) is not None}
    return {"kind": kind, "factor": _number(name, "factor", rope["factor"]),
            "original_max_position_embeddings": original, **yarn}


def _grouped_query_scaling(name: str, kind: str, rope: RopeFields, scaling: dict) -> dict[str, Any]:
    """Return what grouped-query attention reads otherwise, as transformers does.

    The two mscales count together only, and those of YaRN alone: they are the temperature of cosines and sines.
    """
    if kind == "llama3":
        missing = [key for key in _LLAMA3_FIELDS if rope.get(key) is None]
        if missing:
            raise ValueError(f"{name} of type 'llama3' has no {missing[0]}")
        return {key: _number(name, key, rope[key]) for key in _LLAMA3_FIELDS} | _NO_MSCALES
    factor = rope.get("attention_factor") if kind == "yarn" else None
    found = {} if factor is None else {"attention_factor": _number(name, "attention_factor", factor)}
    together = kind == "yarn" and scaling.get("mscale") and scaling.get("mscale_all_dim")
    return found if together else found | _NO_MSCALES


def write_rope(config, fields: Mapping[str, Any] | None = None) -> dict:
    """Return a ModelConfig's RoPE in the dialect of `fields`, whose further keys stay; without `fields` as released."""
    name, given = _of(fields or {})
    more = {key: value for key, value in given.items() if key not in _READ and key not in _GROUPED_READ}
    scaling, beside = _scaling(config), {}
    partial = {} if config.partial_rotary_factor == 1 else {"partial_rotary_factor": config.partial_rotary_factor}
    if fields and _OUTSIDE in fields and config.rope_scaling:
        beside = {_OUTSIDE: config.rope_scaling.original_max_position_embeddings}
    if fields is None or "rope_parameters" not in fields:
        return beside | partial | {"rope_theta": config.rope_theta, "rope_scaling": scaling and more | scaling}
    scaling = scaling or {"rope_type": "default"}
    theirs = {"rope_type": scaling.pop("type", None) or scaling.pop("rope_type"), "rope_theta": config.rope_theta}
    return beside | {"rope_parameters": more | theirs | scaling | partial}


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


def _refuse_unimplemented(name: str, rope: RopeFields, more: Collection[str]) -> None:
    """Raise ValueError for a key whose mathematics is not implemented; those of `more` are."""
    for key, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(f"{name} has {key} with parameters of its own, which is not supported: all layers here "
                             f"have the same")
        if key in _NEUTRAL and key not in more and value is not None and value != _NEUTRAL[key]:
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
    if scaling.kind == "llama3":  # under the key of Llama 3.1's files
        return {"rope_type": scaling.kind, "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                **{key: getattr(scaling, key) for key in _LLAMA3_FIELDS}}
    fields = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn" or scaling.original_max_position_embeddings != config.max_position_embeddings:
        fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "yarn":
        fields |= {key: getattr(scaling, key) for key in _YARN_FIELDS}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    elif scaling.mscale_all_dim:  # scales the softmax with every kind
        fields["mscale_all_dim"] = scaling.mscale_all_dim
    return fields
