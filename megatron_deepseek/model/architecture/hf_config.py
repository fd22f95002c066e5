"""The dialects of Hugging Face's config.json for DeepSeek models, and the fields that this project reads of them.

Two things differ between files. RoPE: hf_rope.py. Defaults: a field that may be missing (hf_keys.py says which) takes
the default of DeepseekV2Config or DeepseekV3Config of transformers 5.23, which are those that its models are built
with.

A field whose value would change the mathematics in a way that the layers here do not implement is refused, never
ignored; fields that describe a run (ep_size, pretraining_tp, use_cache, torch_dtype) are read over.
"""

from collections.abc import Collection

from megatron_deepseek.model.architecture.hf_keys import ALIASES, check_keys, remarks
from megatron_deepseek.model.architecture.hf_rope import read_rope, write_rope

_COMMON_DEFAULTS = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.0,
    "seq_aux": True,
}
_V2_DEFAULTS = _COMMON_DEFAULTS | {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 32, "num_attention_heads": 32, "n_shared_experts": 2, "n_routed_experts": 64,
    "num_experts_per_tok": None, "n_group": None, "topk_group": None, "topk_method": "greedy",
    "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
}
_V3_DEFAULTS = _COMMON_DEFAULTS | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
}
_DEFAULTS = {"deepseek_v2": _V2_DEFAULTS, "deepseek_v3": _V3_DEFAULTS}
_NULL_MEANS = {"n_shared_experts": 0, "n_routed_experts": 0, "moe_intermediate_size": 0, "num_experts_per_tok": 0,
               "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
               "attention_dropout": 0.0, "aux_loss_alpha": 0.0, "norm_topk_prob": False}
_LARGEST = 2**31 - 1  # of a number: no width, count or id comes near it
_MOST_MODULES = 10_000_000  # layers times experts: V3 has 15,872
MISSPELT_GREEDY = "gready"  # the default of the configuration_deepseek.py that the released models come with


def normalise(fields: dict) -> dict:
    """ModelConfig's fields, all of them, from either dialect; `rope_scaling` as RopeScaling's fields or None."""
    defaults = _defaults_for(fields)
    check_keys(fields, defaults)
    given = {ALIASES.get(name, name): value for name, value in fields.items()}
    result = {name: given.get(name, default) for name, default in defaults.items()}
    null_means = _NULL_MEANS | {"topk_method": defaults["topk_method"]}
    result |= {name: value for name, value in null_means.items() if result[name] is None}
    if result["topk_method"] == MISSPELT_GREEDY:
        result["topk_method"] = "greedy"
    if isinstance(result["eos_token_id"], list):
        result["eos_token_id"] = result["eos_token_id"][0] if result["eos_token_id"] else None
    for name, value in result.items():
        _check_type(name, value, _V3_DEFAULTS[name])
    _check_count(result)
    stated = result["max_position_embeddings"] if "max_position_embeddings" in fields else None
    result["rope_theta"], result["rope_scaling"] = read_rope(fields, stated)
    return result


def describe(fields: dict, where: object, overridden: Collection[str] = ()) -> list[str]:
    """What to say of a config.json `where` that was read: see hf_keys.remarks. Not of fields that are `overridden`."""
    read = normalise(fields)
    del read["rope_scaling"]
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    stated = fields | {name: value for name, value in rope.items() if name == "rope_theta"} | dict.fromkeys(overridden)
    return remarks(stated, read, where)


def _defaults_for(fields: dict) -> dict:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(_DEFAULTS)}")
    return _DEFAULTS[model_type]


def _check_type(name: str, value, example) -> None:
    if value is None and name in ("q_lora_rank", "bos_token_id", "eos_token_id"):
        return
    accepted = (int, float) if isinstance(example, float) else type(example)
    if not isinstance(value, accepted) or isinstance(value, bool) != isinstance(example, bool):
        raise ValueError(f"{name} is {value!r}, which is no {type(example).__name__}")
    if not isinstance(value, (bool, str)) and abs(value) > _LARGEST:
        raise ValueError(f"{name} is {str(value)[:40]}, more than {_LARGEST}")


def _check_count(result: dict) -> None:
    """A damaged number of layers or experts must not become hours of listing their tensors."""
    layers = result["num_hidden_layers"] + result["num_nextn_predict_layers"]
    if layers * max(result["n_routed_experts"], 1) > _MOST_MODULES:
        raise ValueError(f"num_hidden_layers {result['num_hidden_layers']}, num_nextn_predict_layers "
                         f"{result['num_nextn_predict_layers']} and n_routed_experts {result['n_routed_experts']} "
                         f"make more than {_MOST_MODULES} layers of experts")


def released_fields(config) -> dict:
    """A ModelConfig as the released files write it, RoPE in their dialect, which transformers 5 still reads."""
    version = "V3" if config.model_type == "deepseek_v3" else "V2"
    fields = {name: getattr(config, name) for name in _V3_DEFAULTS}
    constant = {"hidden_act": "silu", "num_key_value_heads": config.num_attention_heads, "ep_size": 1,
                "pretraining_tp": 1, "use_cache": True, "torch_dtype": "bfloat16"}
    head = {"architectures": [f"Deepseek{version}ForCausalLM"], "model_type": config.model_type}
    return head | dict(sorted((fields | constant | write_rope(config)).items()))


def spelling(fields: dict, name: str) -> str:
    """What the file that `fields` were read from calls ModelConfig's field `name`."""
    return next((alias for alias, own in ALIASES.items() if own == name and alias in fields), name)
