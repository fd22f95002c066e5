"""The families of architectures that this project trains, by the names that config.json gives them.

Another family is a row of FAMILIES, with what its parameters are in parameters.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from megatron_deepseek.model.architecture.fields import (
    GROUPED,
    LATENT,
    RULES,
    WITH_EXPERTS,
    WITH_GROUPS,
    ArchitectureFields,
)
from megatron_deepseek.model.architecture.refused import refusal
from megatron_deepseek.near_names import near_names

OF_EXPERTS = frozenset(name for name, rule in RULES.items() if name == "n_routed_experts" or rule.of_experts
                       or rule.needed in (WITH_EXPERTS, WITH_GROUPS))


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Family:
    """`model_type` and `architectures`, the first of which is written, are config.json's names for it.

    `has` tells whether an architecture is written as one of this family; the first that has it is. `defaults`: what a
    missing key means, where that is not the default of the field (fields.py): those of its class in transformers 5.23,
    with which its models are built. `attention`: LATENT or GROUPED. `fixed`: fields that are the same in all of its
    models, so that its config.json has no such keys. `experts`: whether it has layers that route to experts.
    `constant`: what released files say beside that.
    """

    model_type: str
    architectures: tuple[str, ...]
    has: Callable[[ArchitectureFields], bool]
    defaults: Mapping[str, Any]
    attention: str = LATENT
    experts: bool = True
    fixed: Mapping[str, Any] = field(default_factory=_nothing)
    constant: Mapping[str, Any] = field(default_factory=_nothing)

    def has_key(self, name: str) -> bool:
        """Return whether its config.json may have the field `name`."""
        rule = RULES[name]
        return (name not in self.fixed and not rule.implied and rule.attention in (None, self.attention)
                and (self.experts or name not in OF_EXPERTS))


def _has_v3_router(config: ArchitectureFields) -> bool:
    return config.topk_method == "noaux_tc" or config.scoring_func == "sigmoid"


def _is_plain(config: ArchitectureFields) -> bool:
    """Return whether grouped-query attention has neither a bias of Qwen2's, norms of Qwen3's nor a window."""
    return not (config.qkv_bias or config.qk_norm or config.sliding_window)


_V2_DEFAULTS = MappingProxyType({
    "moe_intermediate_size": 1407, "n_shared_experts": 2, "num_experts_per_tok": None, "n_group": None,
    "topk_group": None, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2})
_V3_DEFAULTS = MappingProxyType({
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "max_position_embeddings": 4096,
    "bos_token_id": 0, "eos_token_id": 1})
_LLAMA_DEFAULTS = MappingProxyType({"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2})
_QWEN_DEFAULTS = MappingProxyType({"max_position_embeddings": 32768})
# transformers has no class for it: the defaults of the configuration_deepseek.py that DeepSeekMoE-16B comes with
_DEEPSEEK_DEFAULTS = MappingProxyType({
    "moe_intermediate_size": 1407, "n_shared_experts": None, "n_routed_experts": None, "num_experts_per_tok": None,
    "scoring_func": "softmax", "norm_topk_prob": False, "first_k_dense_replace": 0, "aux_loss_alpha": 0.001,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2})

_NO_WINDOW = MappingProxyType({"sliding_window": None, "layer_types": ()})
_LLAMA_CONSTANT = MappingProxyType({"mlp_bias": False, "pretraining_tp": 1})
# DeepSeekMoE (arXiv 2401.06066): the top experts of all, their weights as the softmax gives them
_DEEPSEEK_FIXED = _NO_WINDOW | {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0}

FAMILIES = (
    Family("deepseek_v2", ("DeepseekV2ForCausalLM",),
           lambda config: not config.grouped_query and not _has_v3_router(config), _V2_DEFAULTS, fixed=_NO_WINDOW,
           constant=MappingProxyType({"ep_size": 1, "pretraining_tp": 1})),
    Family("deepseek_v3", ("DeepseekV3ForCausalLM",),
           lambda config: not config.grouped_query and _has_v3_router(config), _V3_DEFAULTS, fixed=_NO_WINDOW,
           constant=MappingProxyType({"ep_size": 1, "pretraining_tp": 1})),
    Family("deepseek", ("DeepseekForCausalLM",),
           lambda config: bool(config.n_routed_experts) and _is_plain(config) and all(
               getattr(config, name) == value for name, value in _DEEPSEEK_FIXED.items()),
           _DEEPSEEK_DEFAULTS, GROUPED, fixed=_DEEPSEEK_FIXED, constant=MappingProxyType({"pretraining_tp": 1})),
    Family("llama", ("LlamaForCausalLM",), lambda config: not config.n_routed_experts and _is_plain(config),
           _LLAMA_DEFAULTS, GROUPED, experts=False, fixed=_NO_WINDOW, constant=_LLAMA_CONSTANT),
    Family("qwen2", ("Qwen2ForCausalLM",),
           lambda config: not config.n_routed_experts and config.qkv_bias and not config.qk_norm, _QWEN_DEFAULTS,
           GROUPED, experts=False, fixed=MappingProxyType({"qkv_bias": True, "attention_bias": False})),
    Family("qwen3", ("Qwen3ForCausalLM",),
           lambda config: not config.n_routed_experts and config.qk_norm and not config.qkv_bias,
           _QWEN_DEFAULTS | {"head_dim": 128}, GROUPED, experts=False, fixed=MappingProxyType({"qk_norm": True})),
)


# Models of V3's form whose config.json has a model_type of its own, which is written back: Kimi K2 (arXiv 2507.20534).
_OTHER_NAMES: Mapping[str, str] = MappingProxyType({"kimi_k2": "deepseek_v3"})


def has_family(config: ArchitectureFields) -> bool:
    """Return whether an architecture can be written as one of a family."""
    return any(family.has(config) for family in FAMILIES)


def family_of(config: ArchitectureFields) -> Family:
    """Return the family that an architecture is written as. Raise ValueError where no family has such a mixture."""
    for family in FAMILIES:
        if family.has(config):
            return family
    given = {"n_routed_experts": config.n_routed_experts, "topk_method": config.topk_method,
             "qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm, "sliding_window": config.sliding_window}
    words = ", ".join(f"{name} {value}" for name, value in given.items())
    raise ValueError(f"no family of models has grouped-query attention with {words}")


def other_name(model_type: Any) -> str | None:
    """Return `model_type` where it is another name of a family, None for the family's own or an unknown one."""
    return model_type if isinstance(model_type, str) and model_type in _OTHER_NAMES else None


def name_of(config: ArchitectureFields, other: str | None) -> str:
    """Return the model_type of an architecture's config.json: `other`, if that names its family, or the family's."""
    family = family_of(config)
    return other if other is not None and _OTHER_NAMES[other] == family.model_type else family.model_type


def family_of_file(fields: Mapping[str, Any]) -> Family:
    """Return the family of a parsed config.json: that of `model_type`, or without one that of its `architectures`.

    Raise ValueError, with the reason (refused.py) or the name that may be meant, where it is none of FAMILIES.
    """
    given = fields.get("model_type")
    architectures = fields.get("architectures")
    if given is None and isinstance(architectures, list):
        for family in FAMILIES:
            if any(name in family.architectures for name in architectures):
                return family
    for family in FAMILIES:
        if isinstance(given, str) and _OTHER_NAMES.get(given, given) == family.model_type:
            return family
    refused = refusal(given)
    if refused is not None:
        raise ValueError(refused)
    known = [*(family.model_type for family in FAMILIES), *_OTHER_NAMES]
    near = near_names(given, known, most=1) if isinstance(given, str) else []
    raise ValueError(f"model_type {given!r} is not one of {', '.join(known)}"
                     + (f"; did you mean {near[0]}?" if near else ""))
