"""Makes a ModelConfig of --model and the architecture arguments, which override it."""

import dataclasses
import re
from argparse import Namespace

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.megatron import architecture as megatron
from megatron_deepseek.arguments.model_options import ARCHITECTURE, ROPE_SCALING
from megatron_deepseek.arguments.preference import is_reward
from megatron_deepseek.arguments.vocabulary import padded
from megatron_deepseek.model.architecture.config import ModelConfig, RopeScaling
from megatron_deepseek.model.architecture.fields import LATENT, RULES
from megatron_deepseek.model.architecture.presets import describe_model, load_config


def build_model(args: Namespace) -> ModelConfig:
    """Return the architecture that `args` describe. Raise ValueError, naming arguments, where it contradicts itself."""
    given = {field: getattr(args, field) for _, field, _, _ in ARCHITECTURE if getattr(args, field) is not None}
    base = _base(args, given)
    if args.norm_topk_prob:
        given["norm_topk_prob"] = True
    given["vocab_size"] = padded(_vocabulary(args, base), args)
    if given.get("q_lora_rank") == 0:
        given["q_lora_rank"] = None
    if args.add_qkv_bias:
        given["qkv_bias"] = True
    if args.group_query_attention and not base.grouped_query:
        given = _grouped_query(base, given) | given
    given |= _router(args, base, given) | _layers(args, base, given) | _rope(args, base)
    if args.untie_embeddings_and_output_weights or args.tie_word_embeddings:
        given["tie_word_embeddings"] = args.tie_word_embeddings
    if args.moe_shared_expert_intermediate_size is not None:
        given["n_shared_experts"] = _shared_experts(args, base, given)
    if is_reward(args):
        given |= {"reward_head": True, "tie_word_embeddings": False, "num_nextn_predict_layers": 0}
    try:
        return dataclasses.replace(base, **given)
    except ValueError as error:
        raise ValueError(_name_arguments(str(error), given)) from error


def unpadded_vocab_size(args: Namespace) -> int | None:
    """Return the ids of the vocabulary where the embedding is padded, else None."""
    if args.padded_vocab_size is None and args.make_vocab_size_divisible_by is None:
        return None
    size = _vocabulary(args, _base(args, {}))
    return None if padded(size, args) == size else size


def _vocabulary(args: Namespace, base: ModelConfig) -> int:
    if args.model is None:
        return base.vocab_size
    if args.extra_vocab_size:
        raise ValueError(f"--extra-vocab-size {args.extra_vocab_size} conflicts with --model, whose vocabulary it is; "
                         "use --vocab-size")
    return args.vocab_size or base.vocab_size


def _base(args: Namespace, given: dict) -> ModelConfig:
    """Return the architecture of --model, or without it that of Megatron-LM for these arguments."""
    if args.model is None:
        try:
            return megatron.config_of(args)
        except ValueError as error:
            raise ValueError(_name_arguments(str(error), given)) from error
    try:
        return load_config(args.model)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error


def describe_architecture(args: Namespace, model: ModelConfig) -> tuple[str, ...]:
    """Return lines on what --model's config.json leaves to defaults, and on what of it is not used; without --model on
    the whole architecture.

    What the command line gives counts as given.
    """
    if args.model is None:
        return megatron.describe(args, model)
    given = {field for _, field, _, _ in ARCHITECTURE if getattr(args, field) is not None}
    others = {"scoring_func": args.scoring_func, "topk_method": args.moe_router_enable_expert_bias or None,
              "moe_layer_freq": args.moe_layer_freq, "aux_loss_alpha": args.moe_aux_loss_coeff,
              "seq_aux": args.moe_router_load_balancing_type, "tie_word_embeddings": args.tie_word_embeddings or None}
    return tuple(describe_model(args.model, given | {field for field, value in others.items() if value is not None}))


def _grouped_query(base: ModelConfig, given: dict) -> dict:
    """Return the fields of grouped-query attention in place of those of `base`, whose attention is of latents."""
    heads = given.get("num_attention_heads", base.num_attention_heads)
    size = max(1, given.get("hidden_size", base.hidden_size) // heads)
    without = {name: None for name, rule in RULES.items() if rule.attention == LATENT}
    for name in without.keys() & given.keys():
        raise ValueError(f"{RULES[name].option.name} {given[name]} is of latent attention; --group-query-attention "
                         "takes its place")
    return without | {"num_key_value_heads": heads, "head_dim": size}


def _router(args: Namespace, base: ModelConfig, given: dict) -> dict:
    """Return the fields of how experts are chosen: Megatron has no name for it; the expert bias or groups imply it."""
    result = {} if args.scoring_func is None else {"scoring_func": args.scoring_func}
    if args.moe_router_enable_expert_bias:
        result["topk_method"] = "noaux_tc"
    elif base.topk_method == "greedy" and given.get("n_group", 1) > 1:
        result["topk_method"] = "group_limited_greedy"
    return result


def _layers(args: Namespace, base: ModelConfig, given: dict) -> dict:
    if args.moe_layer_freq is None:
        return {}
    num_layers = given.get("num_hidden_layers", base.num_hidden_layers)
    dense, frequency = values.dense_and_frequency(args.moe_layer_freq, num_layers)
    return {"first_k_dense_replace": dense, "moe_layer_freq": frequency}


def _shared_experts(args: Namespace, base: ModelConfig, given: dict) -> int:
    width = given.get("moe_intermediate_size", base.moe_intermediate_size)
    total = args.moe_shared_expert_intermediate_size
    if total % max(width, 1):
        raise ValueError(f"--moe-shared-expert-intermediate-size {total} is not a multiple of "
                         f"--moe-ffn-hidden-size {width}")
    return total // max(width, 1)


def _rope(args: Namespace, base: ModelConfig) -> dict:
    given = {field: getattr(args, f"rope_{field}") for _, field, _, _ in ROPE_SCALING
             if getattr(args, f"rope_{field}") is not None}
    if args.rope_type is None and not given:
        return {}
    old = base.rope_scaling
    factor = given.get("factor", old.factor if old else 1.0 if args.model is None else None)
    if factor is None and args.rope_type != "rope":
        raise ValueError(f"{_first_rope_option(args, given)} needs --rotary-scaling-factor: "
                         f"--model {args.model} has no scaling")
    if args.rope_type == "rope" or factor == 1:
        return {"rope_scaling": None}
    kind = args.rope_type or (old.kind if old else "yarn")
    fields = (dataclasses.asdict(old) if old else {}) | given | {"kind": kind}
    return {"rope_scaling": RopeScaling(**fields)}


def _first_rope_option(args: Namespace, given: dict) -> str:
    if args.rope_type is not None:
        return f"--rope-type {args.rope_type}"
    return next(f"{option} {given[field]}" for option, field, _, _ in ROPE_SCALING if field in given)


def _name_arguments(message: str, given: dict) -> str:
    """Return `message` with the fields that the command line set under their argument names."""
    for option, field, _, _ in ARCHITECTURE:
        if field in given:
            message = re.sub(rf"\b{field}\b", option, message)
    return message
