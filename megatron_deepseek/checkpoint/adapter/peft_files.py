"""Reads a LoRA adapter of PEFT: adapter_config.json and adapter_model.safetensors.

    base_model.model. + layer + .lora_A.weight    [r, in]
    base_model.model. + layer + .lora_B.weight    [out, r]

Routed experts have keys of their own each (`mlp.experts.3.gate_proj`). PEFT itself, with transformers 5, saves those of
all experts in one tensor, which fused.py takes apart. The scale is lora_alpha / r, or lora_alpha / sqrt(r) with
use_rslora, where patterns may give a layer another rank and alpha.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.adapter import fused
from megatron_deepseek.checkpoint.safetensors_file import StoredTensor, read_header, read_rows
from megatron_deepseek.foreign_json import JsonObject, read_object

CONFIG, WEIGHTS, MTP_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model_mtp.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
# What PEFT can do beside A and B, and would be lost in silence: the value that means "not used".
_UNUSED = {"use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none", "modules_to_save": None,
           "trainable_token_indices": None}


@dataclass(frozen=True, eq=False)
class Factor:
    """A or B of one linear layer, on disk: rows start..stop of a stored tensor, and of each some columns."""

    stored: StoredTensor
    start: int
    stop: int
    columns: slice

    @classmethod
    def whole(cls, stored: StoredTensor) -> "Factor":
        return cls(stored, 0, stored.shape[0], slice(0, stored.shape[1], 1))

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, len(range(self.stored.shape[1])[self.columns])

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows start..stop, by default all, in the stored dtype."""
        end = self.stop if stop is None else self.start + stop
        return read_rows(self.stored, self.start + start, end)[:, self.columns].contiguous()


@dataclass(frozen=True, eq=False)
class Pair:
    """A and B of one linear layer, on disk, and their scale."""

    a: Factor
    b: Factor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter on disk: its pairs by the names of the linear layers. `option` is what messages call the directory."""

    directory: Path
    pairs: Mapping[str, Pair]
    option: str = "--adapter"

    @classmethod
    def read(cls, directory: Path, option: str = "--adapter", mtp: bool = False) -> "Adapter":
        """Look at an adapter's files, with `mtp` also that of MTP modules, which PEFT and transformers do not have.

        Raise ValueError for what is no LoRA of linear layers, or damaged.
        """
        if not (directory / CONFIG).is_file():
            raise ValueError(f"{option} {directory} has no {CONFIG}: it is no adapter of PEFT")
        if not (directory / WEIGHTS).is_file() and (directory / PICKLED).is_file():
            raise ValueError(f"{option} {directory} has {PICKLED} alone, a pickle, which may run any code: save it "
                             f"as {WEIGHTS}, as PEFT does by default")
        config = read_object(directory / CONFIG)
        kind = config.text("peft_type", default="LORA")
        if kind != "LORA":
            raise config.fault("peft_type", "only LORA is known")
        for name, unused in _UNUSED.items():
            if config.fields.get(name, unused) not in (unused, None, [], {}):
                raise config.fault(name, "of which nothing is known here; merge the adapter into its base instead")
        found: dict[str, dict[str, StoredTensor]] = {}
        for file in (WEIGHTS, MTP_WEIGHTS):
            if file == WEIGHTS or (mtp and (directory / file).is_file()):
                _collect(directory / file, found)
        pairs = {name: pair for layer in sorted(found) for name, pair in _pairs(layer, found[layer], config)}
        return cls(directory, pairs, option)

    def fault(self, what: str) -> ValueError:
        """Return the error that says what is wrong with this adapter."""
        return ValueError(f"{self.option} {self.directory} {what}")


def layer_of(name: str) -> str:
    """Return the layer that a tensor of an adapter belongs to."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def _collect(file: Path, found: dict[str, dict[str, StoredTensor]]) -> None:
    for name, tensor in read_header(file).items():
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise ValueError(f"{file} has {name}, which is neither A nor B of a linear layer")
        found.setdefault(match[1], {})[match[2]] = tensor


def _pairs(layer: str, tensors: Mapping[str, StoredTensor], config: JsonObject) -> Iterator[tuple[str, Pair]]:
    """Yield A, B and scale of a layer, or of every expert of a layer's stack.

    Raise ValueError if one is missing, or a rank is another than config's.
    """
    if tensors.keys() != {"A", "B"}:
        raise ValueError(f"{config.where}: {layer} has lora_{min(tensors)} alone")
    a, b = tensors["A"], tensors["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"{a.file}: {layer} has A of shape {a.shape} and B of shape {b.shape}")
    stack = fused.stack_of(layer, config)
    rank = _of_pattern(config, "rank_pattern", "r", stack or layer)
    rank = a.shape[0] if rank is None else int(rank)
    if rank < 1 or (a.shape[0] % rank if stack else a.shape[0] != rank):
        raise ValueError(f"{a.file}: {layer} has rank {a.shape[0]}, {CONFIG} says {rank}")
    alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", stack or layer)
    if alpha is None:
        raise config.fault("lora_alpha", "which is missing")
    scale = alpha / (math.sqrt(rank) if config.boolean("use_rslora", default=False) else rank)
    if stack is None:
        yield layer, Pair(Factor.whole(a), Factor.whole(b), scale)
        return
    for name, rows_of_a, rows_of_b, columns_of_b in fused.experts(stack, rank, b):
        yield name, Pair(Factor(a, *rows_of_a, slice(0, a.shape[1], 1)), Factor(b, *rows_of_b, columns_of_b), scale)


def _of_pattern(config: JsonObject, patterns_key: str, key: str, layer: str) -> float | None:
    """Return the number of the first pattern that a layer's name ends with, as PEFT reads them, else that of all."""
    patterns = config.object(patterns_key, default=None)
    for pattern in patterns.fields if patterns is not None else ():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return patterns.number(pattern)
    return config.number(key, default=None)
