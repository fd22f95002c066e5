"""An adapter as vLLM applies all of it.

vLLM loads an adapter of MLA's kv_b_proj and applies it nowhere (vllm#48974), since it multiplies by that weight in two
parts; and its model of MTP modules takes no adapters. So those are left out here. Left out alone they are lost: merged
into a base of their own (merging.py), they are not.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.adapter.peft_files import CONFIG, MTP_WEIGHTS, WEIGHTS, layer_of
from megatron_deepseek.checkpoint.convert.blocks import OutputTensor
from megatron_deepseek.checkpoint.convert.output_file import OutputFile, write_safetensors
from megatron_deepseek.checkpoint.publishing import write_synced
from megatron_deepseek.checkpoint.safetensors_file import StoredTensor, read_header, stream_rows
from megatron_deepseek.foreign_json import read_object

KV_B_PROJ = "kv_b_proj"


def is_applied(layer: str) -> bool:
    """Return whether vLLM applies the adapter of a layer of the main model."""
    return layer.rpartition(".")[2] != KV_B_PROJ


def unapplied(directory: Path) -> list[str]:
    """Return the layers of an adapter that vLLM would not apply, in order."""
    layers = {layer_of(name) for name in read_header(directory / WEIGHTS)}
    of_mtp = {layer_of(name) for name in read_header(directory / MTP_WEIGHTS)} \
        if (directory / MTP_WEIGHTS).is_file() else set()
    return sorted({layer for layer in layers if not is_applied(layer)} | of_mtp)


def describe(layers: list[str]) -> str:
    """Return in words what `unapplied` found."""
    inner = sum(not is_applied(layer) for layer in layers)
    return f"{len(layers)} layers ({inner} of {KV_B_PROJ}, {len(layers) - inner} others of MTP modules)"


def write_for_vllm(source: Path, target: Path, base: str | None = None) -> None:
    """Write the adapter in `source` to `target`, which is made, without what vLLM does not apply.

    `base` names the base model instead of the one that is named there. Raise ValueError where nothing is left.
    """
    tensors = {name: tensor for name, tensor in read_header(source / WEIGHTS).items() if is_applied(layer_of(name))}
    if not tensors:
        raise ValueError(f"{source} adapts {KV_B_PROJ} alone, which vLLM does not apply: nothing is left of it")
    target.mkdir(parents=True, exist_ok=True)
    outputs = tuple(OutputTensor(name, name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
    write_safetensors(target / WEIGHTS, OutputFile(WEIGHTS, outputs), _Stored(tensors), lambda nbytes: None)
    config = _without(dict(read_object(source / CONFIG).fields))
    if base is not None:
        config["base_model_name_or_path"] = base
    write_synced(target / CONFIG, json.dumps(config, indent=2) + "\n")


def _without(config: dict) -> dict:
    targets = config.get("target_modules")
    if isinstance(targets, list):
        return config | {"target_modules": [name for name in targets if is_applied(str(name))]}
    return config | {"exclude_modules": KV_B_PROJ}  # an expression of PEFT's, of which the part cannot be cut out


@dataclass(frozen=True)
class _Stored:
    """Stored tensors as what `write_safetensors` reads from."""

    tensors: Mapping[str, StoredTensor]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        yield from stream_rows(self.tensors[name], start, stop)
