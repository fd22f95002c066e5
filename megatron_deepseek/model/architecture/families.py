"""The families of architectures that this project trains, by the names that config.json gives them.

Another family (issue "The rest of the family": llama, qwen2, deepseek of DeepSeekMoE-16B, or another name of V3's form
such as kimi_k2) is a row of FAMILIES, with what its parameters are in parameters.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_deepseek.model.architecture.fields import ArchitectureFields
from megatron_deepseek.model.architecture.refused import refusal
from megatron_deepseek.near_names import near_names


@dataclass(frozen=True, eq=False)
class Family:
    """`model_type` and `architectures`, the first of which is written, are config.json's names for it.

    `has` tells whether an architecture is written as one of this family. `defaults`: what a missing key means, where
    that is not the default of the field (fields.py): those of its class in transformers 5.23, with which its models
    are built.
    """

    model_type: str
    architectures: tuple[str, ...]
    has: Callable[[ArchitectureFields], bool]
    defaults: Mapping[str, Any]


def _has_v3_router(config: ArchitectureFields) -> bool:
    return config.topk_method == "noaux_tc" or config.scoring_func == "sigmoid"


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

FAMILIES = (
    Family("deepseek_v2", ("DeepseekV2ForCausalLM",), lambda config: not _has_v3_router(config), _V2_DEFAULTS),
    Family("deepseek_v3", ("DeepseekV3ForCausalLM",), _has_v3_router, _V3_DEFAULTS),
)


# Models of V3's form whose config.json has a model_type of its own, which is written back: Kimi K2 (arXiv 2507.20534).
_OTHER_NAMES: Mapping[str, str] = MappingProxyType({"kimi_k2": "deepseek_v3"})


def family_of(config: ArchitectureFields) -> Family:
    """Return the family that an architecture is written as."""
    return next(family for family in FAMILIES if family.has(config))


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
