"""The dialects of Hugging Face's config.json for the families of models, and the fields that are read of them here.

What differs between files: which fields a family has at all, and which are the same in all of its models
(families.py). RoPE: hf_rope.py. Sliding windows: hf_window.py. Defaults: a field that may be missing (hf_keys.py says
which) takes its default (fields.py), or that of its family.

A field whose value would change the mathematics in a way that the layers here do not implement is refused, never
ignored; fields that describe a run (ep_size, pretraining_tp, use_cache, torch_dtype) are read over.
"""

from collections.abc import Collection
from typing import Any, get_args

from megatron_deepseek.model.architecture.families import Family, family_of, family_of_file
from megatron_deepseek.model.architecture.fields import (
    DEFAULTS,
    FAMILY_DEFAULT,
    GROUPED,
    REFUSED,
    RULES,
    TYPES,
    ArchitectureFields,
)
from megatron_deepseek.model.architecture.hf_keys import ALIASES, check_keys, remarks
from megatron_deepseek.model.architecture.hf_rope import read_rope, write_rope
from megatron_deepseek.model.architecture.hf_window import read_window, write_window

_KEYS = tuple(name for name, rule in RULES.items() if not rule.rotary and not rule.sliding)
_USUAL = {"head_dim", "num_nextn_predict_layers"}  # what files of grouped-query attention rarely say, and need not
_LARGEST = 2**31 - 1  # of a number: no width, count or id comes near it
_MOST_MODULES = 10_000_000  # layers times experts: V3 has 15,872
_CLASSIFIER = "ForSequenceClassification"
MISSPELT_GREEDY = "gready"  # the default of the configuration_deepseek.py that the released models come with


def normalise(fields: dict) -> dict:
    """Return ModelConfig's fields, all of them, from either dialect; `rope_scaling` as RopeScaling's fields or None."""
    family = family_of_file(fields)
    defaults = _defaults(family)
    check_keys(fields, family, defaults)
    given = {ALIASES.get(name, name): value for name, value in fields.items()}
    result = {name: given.get(name, default) for name, default in defaults.items()}
    result |= {name: _meaning_of_null(name, family) for name, value in result.items() if value is None}
    if result.get("topk_method") == MISSPELT_GREEDY:
        result["topk_method"] = "greedy"
    if isinstance(result["eos_token_id"], list):
        result["eos_token_id"] = result["eos_token_id"][0] if result["eos_token_id"] else None
    for name, value in result.items():
        _check_type(name, value)
    result = _without_keys(family) | result
    _check_count(result)
    if family.attention == GROUPED:
        result |= _heads(result)
    if family.has_key("layer_types"):
        result |= read_window(fields, result["num_hidden_layers"])
    stated = result["max_position_embeddings"] if "max_position_embeddings" in fields else None
    return result | read_rope(fields, stated, family.attention)


def _without_keys(family: Family) -> dict[str, Any]:
    """Return the fields that a family's config.json has no key for: the same in all its models, or none of its own."""
    return {name: family.fixed.get(name, DEFAULTS.get(name)) for name, rule in RULES.items()
            if not rule.rotary and not family.has_key(name)}


def _heads(result: dict) -> dict[str, int]:
    """Return heads of keys and values, and the size of a head, where the file leaves them to the other numbers."""
    hidden, heads = result["hidden_size"], result["num_attention_heads"]
    size = result["head_dim"]
    if size is None and (heads < 1 or hidden % heads):
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no "
                         "head_dim")
    return {"head_dim": size or hidden // heads, "num_key_value_heads": result["num_key_value_heads"] or heads}


def describe(fields: dict, where: object, overridden: Collection[str] = ()) -> list[str]:
    """Return what to say of a config.json `where` that was read (hf_keys.remarks), but not of `overridden` fields."""
    family = family_of_file(fields)
    silent = {"rope_scaling", "partial_rotary_factor"} | (_USUAL if family.attention == GROUPED else set())
    read = {name: value for name, value in normalise(fields).items()
            if name not in silent and family.has_key(name) and not RULES[name].sliding}
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    stated = fields | {name: value for name, value in rope.items() if name == "rope_theta"} | dict.fromkeys(overridden)
    return remarks(stated, read, where, family)


def _defaults(family: Family) -> dict[str, Any]:
    """Return what each missing key means, those of the family last; None for what is never missing."""
    return {name: DEFAULTS.get(name) for name in _KEYS if name not in family.defaults and family.has_key(name)
            } | dict(family.defaults)


def _meaning_of_null(name: str, family: Family) -> Any:
    meaning = RULES[name].null
    if meaning is FAMILY_DEFAULT:
        return family.defaults[name]
    return None if meaning is REFUSED else meaning


def _check_type(name: str, value: Any) -> None:
    """Raise ValueError for a value of another type than the field's, or for a number that no model has."""
    kind, *optional = get_args(TYPES[name]) or (TYPES[name],)
    if value is None and optional:
        return
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} is {value!r}, which is no {kind.__name__}")
    if not isinstance(value, (bool, str)) and abs(value) > _LARGEST:
        raise ValueError(f"{name} is {str(value)[:40]}, more than {_LARGEST}")


def _check_count(result: dict) -> None:
    """Raise ValueError for a damaged number of layers or experts, lest their tensors be listed for hours."""
    layers = result["num_hidden_layers"] + result["num_nextn_predict_layers"]
    if layers * max(result["n_routed_experts"], 1) > _MOST_MODULES:
        raise ValueError(f"num_hidden_layers {result['num_hidden_layers']}, num_nextn_predict_layers "
                         f"{result['num_nextn_predict_layers']} and n_routed_experts {result['n_routed_experts']} "
                         f"make more than {_MOST_MODULES} layers of experts")


def released_fields(config: ArchitectureFields) -> dict:
    """Return a ModelConfig as the released files write it, RoPE in their dialect, which transformers 5 still reads."""
    family = family_of(config)
    fields = {name: getattr(config, name) for name in _KEYS if family.has_key(name)}
    if family.attention == GROUPED:
        fields = _said_of_grouped_query(config, fields)
    else:
        fields["num_key_value_heads"] = config.num_attention_heads
    if family.has_key("layer_types"):
        fields |= write_window(config)
    constant = {"hidden_act": "silu", "use_cache": True, "torch_dtype": "bfloat16"}
    head = {"architectures": [family.architectures[0]], "model_type": family.model_type} | reward_fields(config)
    return head | dict(sorted((fields | constant | dict(family.constant) | write_rope(config)).items()))


def read_reward_head(fields: dict) -> dict[str, bool]:
    """Return the fields that a config.json of a sequence classifier sets. Raise ValueError unless it has one label."""
    named = fields.get("architectures")
    if not isinstance(named, list) or not any(str(name).endswith(_CLASSIFIER) for name in named):
        return {}
    labels = fields.get("id2label")
    number = len(labels) if isinstance(labels, dict) else fields.get("num_labels", 2)
    if number != 1:
        raise ValueError(f"architectures {named} with {number} labels: only a reward model, of one label, is known")
    return {"reward_head": True, "tie_word_embeddings": False}


def reward_fields(config: ArchitectureFields) -> dict[str, Any]:
    """Return what config.json says of a reward model: transformers' class, and one label; nothing for other models."""
    if not config.reward_head:
        return {}
    return {"architectures": [family_of(config).architectures[0].replace("ForCausalLM", _CLASSIFIER)],
            "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _said_of_grouped_query(config: ArchitectureFields, fields: dict) -> dict:
    """Return `fields` without those that released files leave out where they say nothing new."""
    unsaid = set() if config.num_nextn_predict_layers else {"num_nextn_predict_layers"}
    if config.head_dim * config.num_attention_heads == config.hidden_size and "head_dim" not in family_of(
            config).defaults:
        unsaid.add("head_dim")
    return {name: value for name, value in fields.items() if name not in unsaid}


def spelling(fields: dict, name: str) -> str:
    """Return what the file that `fields` were read from calls ModelConfig's field `name`."""
    return next((alias for alias, own in ALIASES.items() if own == name and alias in fields), name)
