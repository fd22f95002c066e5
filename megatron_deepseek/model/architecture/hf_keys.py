"""Keys of config.json: which ones are required, which are misspelt, which have no meaning here.

A missing key that decides shapes or mathematics is refused, since the default of some class would be another model.
All that released files and transformers hold in any version is required; what transformers 5 leaves out of its files
(V3's scoring function and method, frequency of layers with experts, balance loss, theta of RoPE) has defaults.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_deepseek.model.architecture.families import OF_EXPERTS, Family
from megatron_deepseek.model.architecture.fields import ALWAYS, DEFAULTS, GROUPED, RULES, WITH_EXPERTS, WITH_GROUPS
from megatron_deepseek.model.architecture.hf_rope import unknown_rope_keys
from megatron_deepseek.model.architecture.hf_window import KEYS as WINDOW_KEYS
from megatron_deepseek.near_names import near_names

ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts",
           "num_experts": "n_routed_experts"}
# Other values would be other mathematics.
_IMPLEMENTED = {"hidden_act": "silu", "mlp_bias": False, "rope_interleave": True, "partial_rotary_factor": 1.0,
                "sliding_window": None, "use_sliding_window": False, "attn_logit_softcapping": None, "clip_qkv": None,
                "final_logit_softcapping": None, "use_qk_norm": False, "index_topk": None,
                "attention_chunk_size": None, "llama_4_scaling": None, "swiglu_limit": None,
                "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
                "attention_multiplier": None, "query_pre_attn_scalar": None, "no_rope_layers": None,
                "use_mrope": False}
# They describe a file, a run or a task, or follow from the others.
_WITHOUT_A_WORD = frozenset((
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "ep_size", "pretraining_tp", "num_key_value_heads", "head_dim", "qk_head_dim", "output_router_logits",
    "quantization_config", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "chunk_size_feed_forward",
    "id2label", "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "sep_token_id", "unk_token_id", "cls_token_id"))
_NEAR, _PERHAPS = 0.8, 0.6  # to any key, and to one that is missing


def check_keys(fields: Mapping[str, Any], family: Family, defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that is misspelt, missing or contradicts another, and for other mathematics."""
    known, missing = _known(), _missing(fields, family, defaults)
    for key in (key for key in fields if key not in known and not key.endswith("_token_id")):  # there are too many
        if not key.isprintable():
            raise ValueError(f"{key!r} is unknown")
        meant = near_names(key, missing, _PERHAPS, 1) or near_names(key, known, _NEAR, 1)
        if meant:
            raise ValueError(f"{key} is unknown; did you mean {meant[0]}?")
    _refuse_contradictions(fields, family)
    if missing:
        raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, without which the "
                         "architecture is not known")
    for key, value in _implemented(family).items():
        if fields.get(key, value) not in (value, None):
            raise ValueError(f"{key} {fields[key]!r} is not supported, only {value!r}")
    if family.attention == GROUPED:
        _refuse_foreign(fields, family)


def _implemented(family: Family) -> dict[str, Any]:
    """Return the keys that a family may have with one value only, and that value."""
    only = dict(_IMPLEMENTED)
    if family.attention == GROUPED:
        del only["partial_rotary_factor"]
        only["rope_interleave"] = False
    return {key: value for key, value in only.items() if not (family.has_key("layer_types") and key in WINDOW_KEYS)}


def _refuse_foreign(fields: Mapping[str, Any], family: Family) -> None:
    """Raise ValueError for a field that other families have, unless it says what all models of this family are."""
    given = {ALIASES.get(key, key): value for key, value in fields.items()}
    for name, rule in RULES.items():
        own = rule.rotary or rule.sliding or rule.implied or family.has_key(name)
        value = family.fixed.get(name, DEFAULTS.get(name))
        if not own and given.get(name, value) not in (value, None):
            raise ValueError(f"{name} {given[name]!r} has no meaning in a model of model_type {family.model_type}"
                             + (f", where it is {value!r}" if name in family.fixed else ""))


def remarks(fields: Mapping[str, Any], read: Mapping[str, Any], where: object, family: Family) -> list[str]:
    """Return lines for whoever starts something: defaults that were taken, and keys that have no meaning here.

    `read`: all fields of the model that the file of `family` was read for, with their values.
    """
    given = {ALIASES.get(key, key) for key in fields}
    silent = given if read.get("n_routed_experts") else given | OF_EXPERTS
    taken = [f"{key} {json.dumps(value)}" for key, value in read.items() if key not in silent]
    unknown = [key for key in fields if key not in _known()] + unknown_rope_keys(fields)
    lines = [f"{where} does not say, so these are taken: {', '.join(taken)}"] if taken else []
    if unknown:
        lines.append(f"{where} has {', '.join(unknown)}, without meaning here: kept for exports")
    return lines


def _known() -> set[str]:
    return {*(name for name, rule in RULES.items() if not rule.implied), *ALIASES, *_IMPLEMENTED, *_WITHOUT_A_WORD,
            *WINDOW_KEYS}


def _refuse_contradictions(fields: Mapping[str, Any], family: Family) -> None:
    for alias, key in ALIASES.items():
        if alias in fields and key in fields and fields[alias] != fields[key]:
            raise ValueError(f"{alias} {fields[alias]!r} and {key} {fields[key]!r} are two names of one field")
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if family.attention != GROUPED and None not in (heads, kv_heads) and heads != kv_heads:
        raise ValueError(f"num_key_value_heads {kv_heads} differs from num_attention_heads {heads}; "
                         f"latent attention has one key and value for each head")


def _missing(fields: Mapping[str, Any], family: Family, defaults: Mapping[str, Any]) -> list[str]:
    """Return the keys without which the architecture is not known, in the order of the fields."""
    given = {ALIASES.get(key, key): value for key, value in fields.items()}
    wanted = {ALWAYS}
    if given.get("n_routed_experts"):
        wanted.add(WITH_EXPERTS)
        if given.get("topk_method", defaults.get("topk_method", "greedy")) not in ("greedy", "gready"):
            wanted.add(WITH_GROUPS)
    return [name for name, rule in RULES.items()
            if rule.needed in wanted and family.has_key(name) and name not in given]
