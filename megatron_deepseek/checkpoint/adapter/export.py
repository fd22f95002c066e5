"""Writes the adapters of a checkpoint as PEFT's files, a few rows at a time."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_deepseek.checkpoint.adapter.base import Base
from megatron_deepseek.checkpoint.adapter.peft_config import peft_config
from megatron_deepseek.checkpoint.adapter.peft_files import CONFIG, MTP_WEIGHTS, PREFIX, WEIGHTS
from megatron_deepseek.checkpoint.convert.blocks import OutputTensor
from megatron_deepseek.checkpoint.convert.names import Place
from megatron_deepseek.checkpoint.convert.output_file import OutputFile, write_safetensors
from megatron_deepseek.checkpoint.convert.source import StackedSource
from megatron_deepseek.checkpoint.dcp.files import DcpDirectory
from megatron_deepseek.checkpoint.native import WEIGHTS as NATIVE
from megatron_deepseek.checkpoint.publishing import write_synced
from megatron_deepseek.model.architecture.adapters import LoraSettings, adapter_rows
from megatron_deepseek.model.architecture.config import ModelConfig

ADAPTER = "adapter"  # of a checkpoint's directory


def adapter_places(config: ModelConfig, lora: LoraSettings) -> list[Place]:
    """Return the place of every A and B of a linear layer, of each expert by itself, in our stacked parameters."""
    return [Place(tensor.name, tensor.shape, row.name, row.shape, tensor.offset)
            for row in adapter_rows(config, lora) for expert in range(row.shape[0] if row.stacked else 1)
            for tensor in row.hf_tensors(expert)]


def write_adapter(checkpoint: Path, config: ModelConfig, lora: LoraSettings, base: str, directory: Path) -> None:
    """Write the adapters of `checkpoint`, whose tensors are on the disk, to `directory`, which is made.

    `base` names the base model in adapter_config.json. Adapters of MTP modules are in a file of their own.
    """
    stored, places = DcpDirectory(checkpoint), adapter_places(config, lora)
    dtypes = {place.name: stored.dtypes[NATIVE + place.whole] for place in places}
    source = StackedSource(checkpoint, config, stored, {place.name: place for place in places},
                           {place.name: place.shape for place in places}, dtypes, {}, {}, NATIVE)
    directory.mkdir(parents=True, exist_ok=True)
    mtp = tuple(f"model.layers.{config.num_hidden_layers + depth}."
                for depth in range(config.num_nextn_predict_layers))
    of_mtp = [place for place in places if mtp and place.name.startswith(mtp)]
    _write(directory / WEIGHTS, [place for place in places if place not in of_mtp], dtypes, source)
    if of_mtp:
        _write(directory / MTP_WEIGHTS, of_mtp, dtypes, source)
    write_synced(directory / CONFIG, json.dumps(peft_config(config, lora, base), indent=2) + "\n")


def add_adapter(config: ModelConfig, lora: LoraSettings, base: Base, checkpoint: Path) -> None:
    """Write the adapters of a checkpoint to its directory `adapter/`, whose files are on the disk afterwards."""
    directory = checkpoint / ADAPTER
    write_adapter(checkpoint, config, lora, str(base.directory), directory)
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write(path: Path, places: Sequence[Place], dtypes: dict[str, torch.dtype], source: StackedSource) -> None:
    tensors = tuple(OutputTensor(PREFIX + place.name, place.name, place.shape, dtypes[place.name]) for place in places)
    write_safetensors(path, OutputFile(path.name, tensors), source, lambda nbytes: None)
