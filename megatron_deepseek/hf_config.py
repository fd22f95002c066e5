"""The dialects of Hugging Face's config.json for DeepSeek models, and the fields that this project reads of them.

Two things differ between files. RoPE: released files have `rope_theta` and `rope_scaling` (with "type"), transformers 5
writes one dictionary `rope_parameters` (with "rope_type"). Defaults: a field that is missing takes the default of
DeepseekV2Config or DeepseekV3Config of transformers 5.23, which are those that its models are built with.

A field whose value would change the mathematics in a way that the layers here do not implement is refused, never
ignored; fields that describe a run (ep_size, pretraining_tp, use_cache, torch_dtype) are read over.
"""

from megatron_deepseek.foreign_json import JsonObject

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
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts",
            "num_experts": "n_routed_experts"}
_NULL_MEANS = {"n_shared_experts": 0, "n_routed_experts": 0, "moe_intermediate_size": 0, "num_experts_per_tok": 0,
               "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
               "attention_dropout": 0.0, "aux_loss_alpha": 0.0, "norm_topk_prob": False, "topk_method": "greedy"}
_IMPLEMENTED = {"hidden_act": "silu", "mlp_bias": False, "rope_interleave": True}
_LARGEST = 2**31 - 1  # of a number: no width, count or id comes near it
_MOST_MODULES = 10_000_000  # layers times experts: V3 has 15,872
_YARN_FIELDS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def normalise(fields: dict) -> dict:
    """ModelConfig's fields, all of them, from either dialect; `rope_scaling` as RopeScaling's fields or None."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(_DEFAULTS)}")
    _refuse_other_mathematics(fields)
    given = {_ALIASES.get(name, name): value for name, value in fields.items()}
    result = {name: given.get(name, default) for name, default in _DEFAULTS[model_type].items()}
    result |= {name: value for name, value in _NULL_MEANS.items() if result[name] is None}
    if isinstance(result["eos_token_id"], list):
        result["eos_token_id"] = next(iter(result["eos_token_id"]), None)
    for name, value in result.items():
        _check_type(name, value, _V3_DEFAULTS[name])
    _check_count(result)
    result["rope_theta"], result["rope_scaling"] = _read_rope(fields, result["max_position_embeddings"])
    return result


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


def _refuse_other_mathematics(fields: dict) -> None:
    for name, value in _IMPLEMENTED.items():
        if fields.get(name, value) not in (value, None):
            raise ValueError(f"{name} {fields[name]!r} is not supported, only {value!r}")
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if None not in (heads, kv_heads) and heads != kv_heads:
        raise ValueError(f"num_key_value_heads {kv_heads} differs from num_attention_heads {heads}; "
                         f"latent attention has one key and value for each head")


def _read_rope(fields: dict, max_position_embeddings: int) -> tuple[float, dict | None]:
    given = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    scaling = JsonObject.of(fields.get(given) or {}, given)
    rope = scaling.fields
    theta = (scaling if "rope_theta" in rope else JsonObject(fields, "RoPE")).number("rope_theta", 0, default=None)
    theta = 10000.0 if theta is None else theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    for name, only in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.get(name, only) not in (only, None):
            raise ValueError(f"rope_scaling {name} {rope[name]!r} is not supported")
    if rope.get("factor") is None:
        raise ValueError(f"rope_scaling of type {kind!r} has no factor")
    original = max_position_embeddings
    if rope.get("original_max_position_embeddings"):
        original = scaling.integer("original_max_position_embeddings", 1, _LARGEST)
    yarn = {name: scaling.number(name) for name in _YARN_FIELDS if rope.get(name) is not None}
    factor = scaling.number("factor")
    return theta, {"kind": kind, "factor": factor, "original_max_position_embeddings": original, **yarn}


def released_fields(config) -> dict:
    """A ModelConfig as the released files write it, RoPE in their dialect, which transformers 5 still reads."""
    version = "V3" if config.model_type == "deepseek_v3" else "V2"
    fields = {name: getattr(config, name) for name in _V3_DEFAULTS}
    constant = {"hidden_act": "silu", "num_key_value_heads": config.num_attention_heads, "ep_size": 1,
                "pretraining_tp": 1, "use_cache": True, "torch_dtype": "bfloat16"}
    rope = {"rope_theta": config.rope_theta, "rope_scaling": _write_rope(config)}
    head = {"architectures": [f"Deepseek{version}ForCausalLM"], "model_type": config.model_type}
    return head | dict(sorted((fields | constant | rope).items()))


def spelling(fields: dict, name: str) -> str:
    """What the file that `fields` were read from calls ModelConfig's field `name`."""
    return next((alias for alias, own in _ALIASES.items() if own == name and alias in fields), name)


def write_rope(config, fields: dict) -> dict:
    """RoPE in the dialect of `fields`: one rope_parameters, or rope_theta and rope_scaling."""
    if "rope_parameters" not in fields:
        return {"rope_theta": config.rope_theta, "rope_scaling": _write_rope(config)}
    scaling = _write_rope(config) or {"type": "default"}
    return {"rope_parameters": {"rope_type": scaling.pop("type"), "rope_theta": config.rope_theta, **scaling}}


def _write_rope(config) -> dict | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    fields = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn" or scaling.original_max_position_embeddings != config.max_position_embeddings:
        fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "yarn":
        fields |= {name: getattr(scaling, name) for name in _YARN_FIELDS}
    return fields
