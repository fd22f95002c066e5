"""A LoRA adapter of PEFT beside the base weights: adapter_config.json and adapter_model.safetensors.

Each adapted linear layer gets W + scale * B A as its weight (quantised.py), with the scale of PEFT: lora_alpha / r, or
lora_alpha / sqrt(r) with use_rslora. W may be plain, FP8 or NF4, and is not changed. Under tensor parallelism a rank
takes the rows of B or the columns of A that its part of W has, so that sums over ranks stay what they are.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_deepseek.checkpoint.safetensors_file import StoredTensor, read_header, read_rows
from megatron_deepseek.foreign_json import JsonObject, read_object
from megatron_deepseek.inference.quantised import AdaptedWeight, exchange, held_weight
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.tensor import ParallelLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
# What PEFT can do beside A and B on linear layers, and would be lost in silence: the value that means "not used".
_UNUSED = {"use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none", "modules_to_save": None,
           "target_parameters": None, "trainable_token_indices": None}


@dataclass(frozen=True, eq=False)
class Pair:
    """A and B of one linear layer, on disk, and their scale."""

    a: StoredTensor
    b: StoredTensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter on disk: its pairs by the names of the linear layers."""

    directory: Path
    pairs: Mapping[str, Pair]

    @classmethod
    def read(cls, directory: Path) -> "Adapter":
        """Look at an adapter's files. Raise ValueError for what is no LoRA of linear layers, or damaged."""
        if not (directory / CONFIG).is_file():
            raise ValueError(f"--adapter {directory} has no {CONFIG}: it is no adapter of PEFT")
        config = read_object(directory / CONFIG)
        kind = config.text("peft_type", default="LORA")
        if kind != "LORA":
            raise config.fault("peft_type", "only LORA is known")
        for name, unused in _UNUSED.items():
            if config.fields.get(name, unused) not in (unused, None, [], {}):
                raise config.fault(name, "of which nothing is known here; merge the adapter into its base instead")
        stored, found = read_header(directory / WEIGHTS), {}
        for name, tensor in stored.items():
            match = _NAME.fullmatch(name.removeprefix(_PREFIX))
            if match is None:
                raise ValueError(f"{directory / WEIGHTS} has {name}, which is neither A nor B of a linear layer")
            found.setdefault(match[1], {})[match[2]] = tensor
        return cls(directory, {layer: _pair(layer, found[layer], config) for layer in sorted(found)})


def _pair(layer: str, tensors: Mapping[str, StoredTensor], config: JsonObject) -> Pair:
    """Return A, B and scale of a layer; raise ValueError if one is missing or their ranks differ."""
    if tensors.keys() != {"A", "B"}:
        raise ValueError(f"{config.where}: {layer} has lora_{min(tensors)} alone")
    a, b = tensors["A"], tensors["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"{a.file}: {layer} has A of shape {a.shape} and B of shape {b.shape}")
    alpha = _of_pattern(config.object("alpha_pattern", default=None), layer)
    alpha = config.number("lora_alpha") if alpha is None else alpha
    rank = a.shape[0]
    return Pair(a, b, alpha / (math.sqrt(rank) if config.boolean("use_rslora", default=False) else rank))


def _of_pattern(patterns: JsonObject | None, layer: str) -> float | None:
    """Return the number of the first pattern that a layer's name ends with, as PEFT reads them."""
    for pattern in patterns.fields if patterns is not None else ():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return patterns.number(pattern)
    return None


def attach(adapter: Adapter, stage: nn.Module, meshes: Meshes, dtype: torch.dtype) -> None:
    """Put the adapter beside this rank's weights. Raise ValueError for a layer that the model has not, or of another
    shape.
    """
    linears = {name: module for name, module in stage.named_modules() if isinstance(module, ParallelLinear)}
    for name, pair in adapter.pairs.items():
        if name not in linears or name == "lm_head":
            raise ValueError(f"--adapter {adapter.directory} adapts {name}, which is no linear layer of this model's "
                             "attention, MLPs or shared experts; merge the adapter into its base instead")
        base = held_weight(linears[name])
        a, b = (_read(stored, meshes, dtype) for stored in (pair.a, pair.b))
        a, b = (_own(each, dim, base.shape[dim], meshes, adapter, name) for each, dim in ((a, 1), (b, 0)))
        exchange(linears[name], "weight", AdaptedWeight(base, a, b, pair.scale))


def _read(stored: StoredTensor, meshes: Meshes, dtype: torch.dtype) -> torch.Tensor:
    return read_rows(stored, 0, stored.shape[0]).to(meshes.device, dtype)


def _own(whole: torch.Tensor, dim: int, size: int, meshes: Meshes, adapter: Adapter, name: str) -> torch.Tensor:
    """Return this rank's `size` rows or columns of A or B; all of them where the base has all."""
    if whole.shape[dim] == size:
        return whole
    if whole.shape[dim] != size * meshes.layout.tp:
        raise ValueError(f"--adapter {adapter.directory}: {name} has {whole.shape[dim]} "
                         f"{'inputs' if dim else 'outputs'} there, the model's has {size * meshes.layout.tp}")
    return whole.narrow(dim, meshes.rank("tp") * size, size).contiguous()
