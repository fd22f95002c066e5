"""adapter_config.json of an adapter, in the form in which PEFT loads and applies all of it.

PEFT 0.21.2 moves every target module whose name ends in gate_proj, up_proj or down_proj to the routed experts, and so
neither trains nor loads adapters of dense and shared MLPs (peft#3711). As target *parameters* they stay where they are.
Routed experts are two stacked parameters in transformers 5, of which PEFT fuses gate and up: rank and alpha are double
there. The file has keys of every expert, which PEFT fuses itself on loading, and which vLLM takes.
"""

from collections.abc import Sequence
from typing import Any

from megatron_deepseek.model.architecture.adapters import ATTENTION, LoraSettings, adapted_rows, group_of
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import Parameter, parameters

_GATE_UP = "experts.gate_up_proj"


def peft_config(config: ModelConfig, lora: LoraSettings, base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json; `base` names the base model. MTP modules are left out.

    PEFT refuses dropout on parameters: it is named where modules alone have adapters.
    """
    rows = [row for row in adapted_rows(config, lora) if row.layer < config.num_hidden_layers]
    modules = [row for row in rows if group_of(config, row) == ATTENTION]
    others = [row for row in rows if group_of(config, row) != ATTENTION]
    fused = any(row.name.endswith(_GATE_UP) for row in others)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.lora_rank, "lora_alpha": lora.lora_alpha, "lora_dropout": 0.0 if others else lora.lora_dropout,
        "use_rslora": lora.lora_rs,
        "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
        "target_modules": [name.removesuffix(".weight") for name in _names(config, modules)],
        "target_parameters": _names(config, others) or None,
        "rank_pattern": {_GATE_UP: 2 * lora.lora_rank} if fused else {},
        "alpha_pattern": {_GATE_UP: lora.lora_alpha * (2**0.5 if lora.lora_rs else 2)} if fused else {}}


def _names(config: ModelConfig, rows: Sequence[Parameter]) -> list[str]:
    """Return names that PEFT finds `rows` by: without the layer's where every layer's is among them."""
    chosen = {row.name for row in rows}
    left = {_tail(row) for row in parameters(config) if row.layer is not None
            and row.layer < config.num_hidden_layers and row.name not in chosen}
    return list(dict.fromkeys(row.name if _tail(row) in left else _tail(row) for row in rows))


def _tail(row: Parameter) -> str:
    """Return a weight's name within its layer, as mlp.gate_proj.weight; of attention q_b_proj.weight."""
    return row.name.split(".", 3)[3].removeprefix("self_attn.")
