"""Loading the base and the adapters of a LoRA run: from weights at its first start, from its own checkpoints later."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from megatron_deepseek.checkpoint.adapter.base import Base, form_of, holds_adapters, read_base
from megatron_deepseek.checkpoint.adapter.export import adapter_places
from megatron_deepseek.checkpoint.adapter.peft_files import Adapter, Factor
from megatron_deepseek.checkpoint.convert.formats import open_native
from megatron_deepseek.checkpoint.convert.huggingface import open_huggingface
from megatron_deepseek.checkpoint.convert.mtp import module_prefixes
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.verification import verify
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.checkpoint.job.base_hash import base_hash
from megatron_deepseek.checkpoint.job.base_weights import fill_held
from megatron_deepseek.checkpoint.job.hf_reader import HuggingFaceReader
from megatron_deepseek.checkpoint.job.state import adapter_state
from megatron_deepseek.checkpoint.loadable import refuse_damage, stored_architecture
from megatron_deepseek.checkpoint.tracker import is_huggingface
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.base_weights import quantised_rows
from megatron_deepseek.model.architecture.config import ModelConfig


def load_with_base(directory: Path, stages: list[nn.Module], optimizer: torch.optim.Optimizer | None,
                   device: torch.device, dropped: Sequence[str] = ()) -> tuple[TrainState, Base]:
    """Fill base and adapters from a checkpoint of adapters, or the base alone from any weights. Every rank calls it.

    `dropped` has beginnings of the names of parameters that the base holds and the model does without. Raise
    ValueError, on every rank, for what `checkpoint.load` refuses, and for another base than the adapters'.
    """
    if not holds_adapters(directory):
        found = _load_base(directory, stages, device, dropped)
        return TrainState(), Base(directory.resolve(), found, form_of(stages[0].base))
    base, _ = read_base(directory)
    refuse_damage(base.directory, verify(base.directory) or [])
    found = _load_base(base.directory, stages, device, _beyond(base.directory, stages))
    if found != base.hash:
        raise ValueError(f"{directory} holds adapters of another base than {base.directory} is now: the hash of its "
                         f"numbers is {found}, it was {base.hash}; float32 numbers have another one with --bf16")
    return checkpoint.load(directory, stages, optimizer), base


def _load_base(directory: Path, stages: list[nn.Module], device: torch.device, dropped: Sequence[str]) -> str:
    """Fill the base from any weights, what is kept as bytes in a second pass; return the hash of its numbers."""
    config = stages[0].config
    held = [row.name for row in quantised_rows(config)] if stages[0].base is not None else []
    checkpoint.load(directory, stages, None, dropped=(*dropped, *held), base=True)
    if not held:
        return base_hash(stages, device)
    source = checkpoint.together(lambda: _open(directory, config))
    return base_hash(stages, device, checkpoint.together(lambda: fill_held(stages, source, device)))


def _open(directory: Path, config: ModelConfig) -> TensorSource:
    without_mtp = not config.num_nextn_predict_layers
    if is_huggingface(directory):
        return open_huggingface(directory, without_mtp)
    return open_native(directory, without_mtp)[0]


def _beyond(base: Path, stages: list[nn.Module]) -> list[str]:
    """Return the beginnings of the names of MTP modules that the base holds and the model does without."""
    mine = stages[0].config.num_nextn_predict_layers
    return list(module_prefixes(stored_architecture(base), mine))


def load_adapter(directory: Path, stages: list[nn.Module], config: ModelConfig, lora: LoraSettings) -> None:
    """Fill the adapters of the stages from PEFT's files. Every rank calls it.

    Raise ValueError for what `check_adapter` refuses.
    """
    source = check_adapter(directory, config, lora)
    dcp.load(adapter_state(stages), storage_reader=HuggingFaceReader(source, adapter_places(config, lora)))


def check_adapter(directory: Path, config: ModelConfig, lora: LoraSettings) -> "PeftSource":
    """Look at PEFT's files, of which headers alone are read.

    Raise ValueError unless they have the adapters that `lora` names, all of them and no others.
    """
    adapter = Adapter.read(directory, "--load-adapter", mtp=config.num_nextn_predict_layers > 0)
    places, source = adapter_places(config, lora), PeftSource(config, adapter)
    _check(adapter, {layer_and_factor(place.name)[0] for place in places}, lora)
    for place in places:
        found = source.factor(place.name).shape
        if found != place.shape:
            raise adapter.fault(f"has {place.name} of shape {found}, this model's has {place.shape}")
    return source


def layer_and_factor(name: str) -> tuple[str, str]:
    """Return the layer, and "A" or "B", of a tensor LAYER.lora_A.weight."""
    layer, factor, _ = name.rsplit(".", 2)
    return layer, factor[-1]


def _check(adapter: Adapter, layers: set[str], lora: LoraSettings) -> None:
    more, missing = sorted(adapter.pairs.keys() - layers), sorted(layers - adapter.pairs.keys())
    targets = " ".join(lora.lora_target)
    if more:
        raise adapter.fault(f"adapts {len(more)} layers that --lora-target {targets} does not name, first {more[0]}")
    if missing:
        raise adapter.fault(f"lacks {len(missing)} layers that --lora-target {targets} names, first {missing[0]}")
    for layer, pair in adapter.pairs.items():
        if pair.rank != lora.lora_rank:
            raise adapter.fault(f"has rank {pair.rank} for {layer}, --lora-rank is {lora.lora_rank}")
        if abs(pair.scale - lora.scale) > 1e-6 * lora.scale:
            raise adapter.fault(f"has scale {pair.scale:g} for {layer}, --lora-alpha {lora.lora_alpha:g} and "
                                f"--lora-rank {lora.lora_rank}{' with --lora-rs' * lora.lora_rs} give {lora.scale:g}")


@dataclass(frozen=True, eq=False)
class PeftSource:
    """What HuggingFaceReader asks of a source."""

    config: ModelConfig
    adapter: Adapter

    def factor(self, name: str) -> Factor:
        layer, factor = layer_and_factor(name)
        pair = self.adapter.pairs[layer]
        return pair.a if factor == "A" else pair.b

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.factor(name).read(start, stop)
