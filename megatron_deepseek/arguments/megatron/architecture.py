"""The architecture that Megatron-LM's arguments give without --model, with Megatron-LM's defaults.

Numbers that are not given are those of megatron-core 0.16 to 0.19 (arguments.py, MLATransformerConfig).
"""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_deepseek.arguments.model_options import ARCHITECTURE
from megatron_deepseek.arguments.vocabulary import vocabulary
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.fields import RULES
from megatron_deepseek.model.architecture.presets import PRESETS

# Defaults of a command line without --model, where they change what is trained and are others than this project's.
DEFAULTS: Mapping[str, Any] = MappingProxyType(dict(
    adam_beta2=0.999, weight_decay=0.01, lr_decay_style="linear", lr_wsd_decay_style="exponential",
    mtp_loss_scaling_factor=0.1))
_LATENT_FIELDS: Mapping[str, Any] = MappingProxyType(dict(
    kv_lora_rank=32, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None))
_DEFAULT_FIELDS: Mapping[str, Any] = MappingProxyType(dict(
    rms_norm_eps=1e-5, rope_theta=10000.0, initializer_range=0.02, tie_word_embeddings=True, aux_loss_alpha=0.0,
    seq_aux=False, num_experts_per_tok=2, num_nextn_predict_layers=0))
_NEEDED = MappingProxyType({"--num-layers": "num_hidden_layers", "--hidden-size": "hidden_size",
                            "--num-attention-heads": "num_attention_heads",
                            "--max-position-embeddings": "max_position_embeddings"})
# What every model here is, and Megatron-LM's model only with the option: (dest, value it must have, as typed)
_MARKS = (("swiglu", "--swiglu"), ("normalization", "--normalization RMSNorm"),
          ("position_embedding_type", "--position-embedding-type rope"),
          ("disable_bias_linear", "--disable-bias-linear"), ("qk_layernorm", "--qk-layernorm"),
          ("attention_dropout", "--attention-dropout 0"), ("hidden_dropout", "--hidden-dropout 0"))


def config_of(args: Namespace) -> ModelConfig:
    """Return the architecture of `args` without --model. Raise ValueError, naming all that is missing."""
    given = {field: getattr(args, field) for _, field, _, _ in ARCHITECTURE if getattr(args, field) is not None}
    missing = [option for option, field in _NEEDED.items() if field not in given]
    rows, hint = vocabulary(args)
    if rows is None:
        missing.append(f"--vocab-size ({hint})")
    if missing:
        raise ValueError(_lacks(missing, bool(given)))
    width = given.get("intermediate_size", _usual_width(args, given["hidden_size"]))
    of_experts = {} if not given.get("n_routed_experts") else {
        "moe_intermediate_size": width, "scoring_func": args.scoring_func or "softmax",
        "norm_topk_prob": args.scoring_func == "sigmoid" or not args.moe_router_pre_softmax}
    fields = {**_DEFAULT_FIELDS, **_attention(args, given), "intermediate_size": width, **of_experts, **given,
              "vocab_size": rows}
    return ModelConfig(**{**fields, "q_lora_rank": fields.get("q_lora_rank") or None})


def _attention(args: Namespace, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of latent attention, where the arguments speak of it, or those of heads that queries share."""
    if args.multi_latent_attention or "kv_lora_rank" in given:
        return _LATENT_FIELDS
    heads = given["num_attention_heads"]
    return {"num_key_value_heads": 1 if args.group_query_attention else heads,
            "head_dim": given["hidden_size"] // heads, "qkv_bias": args.add_qkv_bias,
            "qk_norm": bool(args.qk_layernorm)}


def _lacks(missing: list[str], begun: bool) -> str:
    presets = "--help-models lists the presets; or a config.json"
    if begun:
        return f"the architecture lacks {', '.join(missing)}; without these --model is missing ({presets})"
    return f"--model is missing ({presets}), or an architecture by arguments: {', '.join(missing)} and others"


def _usual_width(args: Namespace, hidden_size: int) -> int:
    """Return Megatron-LM's --ffn-hidden-size where none is given."""
    return int((4 * hidden_size * 2 / 3) / 64) * 64 if args.swiglu else 4 * hidden_size


def describe(args: Namespace, model: ModelConfig) -> tuple[str, ...]:
    """Return the lines on an architecture by arguments alone: what was understood, how it differs from a preset."""
    lines = [f"architecture by arguments: {_summary(model)}", _against_preset(model)]
    absent = [text for dest, text in _MARKS if getattr(args, dest) in (None, False)
              and not (model.grouped_query and dest == "qk_layernorm")]
    if absent:
        lines.append(f"as every model here, and Megatron-LM's only if given: {' '.join(absent)}")
    if model.n_group > 1 and model.topk_method == "group_limited_greedy":
        lines.append("a group of experts is chosen by its best one, as in V2; Megatron-LM sums several of its best")
    return tuple(lines)


def _summary(model: ModelConfig) -> str:
    dense = model.num_hidden_layers - model.num_moe_layers
    experts = "" if not model.n_routed_experts else (
        f"{model.n_routed_experts} experts of {model.moe_intermediate_size}, top {model.num_experts_per_tok} by "
        f"{model.scoring_func}{', normalised' * model.norm_topk_prob}"
        + (f", from {model.topk_group} of {model.n_group} groups" if model.n_group > 1 else "")
        + f"{', with a bias' * (model.topk_method == 'noaux_tc')}, {model.n_shared_experts} shared; ")
    return (f"{model.num_hidden_layers} layers ({dense} dense, width {model.intermediate_size}), hidden size "
            f"{model.hidden_size}, {_heads(model)}; {experts}{model.num_nextn_predict_layers} MTP modules; vocabulary "
            f"{model.vocab_size}, embeddings {'tied' if model.tie_word_embeddings else 'untied'}")


def _heads(model: ModelConfig) -> str:
    if model.grouped_query:
        return (f"{model.num_attention_heads} heads of {model.head_dim} for {model.num_key_value_heads} of keys and "
                f"values{', with biases' * model.qkv_bias}{', normed' * model.qk_norm}")
    return (f"{model.num_attention_heads} heads of {model.qk_nope_head_dim}+{model.qk_rope_head_dim} and "
            f"{model.v_head_dim}, latents {model.q_lora_rank or 'none'} and {model.kv_lora_rank}")


def _against_preset(model: ModelConfig) -> str:
    compared = [name for name, rule in RULES.items() if rule.match is not None or name == "max_position_embeddings"]

    def differences(config: ModelConfig) -> list[str]:
        return [name for name in compared if getattr(config, name) != getattr(model, name)]

    nearest = min(PRESETS, key=lambda preset: len(differences(preset.config)))
    different = [f"{name} {_short(getattr(model, name))} ({_short(getattr(nearest.config, name))})"
                 for name in differences(nearest.config)]
    if not different:
        return f"it is {nearest.name}'s"
    return f"nearest preset {nearest.name}, whose values are in parentheses: {', '.join(different)}"


def _short(value: Any) -> str:
    """Return a value in few words: of a rotary scaling its kind and factor."""
    if dataclasses.is_dataclass(value):
        return f"{value.kind} x{value.factor:g}"
    return "none" if value is None else str(value)
