"""A small model with adapters beside it, and the checkpoint that a job would make of them."""

from functools import partial
from pathlib import Path

import torch
from small_checkpoints import v3_directory
from small_models import whole_stage

from megatron_deepseek.checkpoint.adapter.base import BASE
from megatron_deepseek.checkpoint.adapter.export import add_adapter
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.adapters import load_with_base
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.architecture.adapters import LoraSettings, is_adapter
from megatron_deepseek.model.architecture.base_weights import BaseSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions
from megatron_deepseek.model.init import fill_normal
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LORA = LoraSettings(2, 3.0, ("all", "router", "mtp"))
CPU = torch.device("cpu")


class AdapterBench:
    """A base, and a checkpoint of lively adapters beside it."""

    def __init__(self, root: Path, meshes, lora: LoraSettings = LORA, held: BaseSettings | None = None):
        self.root, self.meshes, self.lora, self.held = root, meshes, lora, held
        self.released = self.release(root)
        self.config = ModelConfig.from_file(self.released / "config.json")
        self.trainer = self.new()
        _, self.base = load_with_base(self.released, self.trainer.stages, None, CPU)
        for name, parameter in self.trainer.stages[0].named_parameters():
            if is_adapter(name):
                fill_normal(parameter, 0.3, 0, name)
        for state in self.trainer.optimizer.state.values():
            state["exp_avg"].fill_(0.25)
        self.saved = self.save(root / "save")

    def release(self, root: Path) -> Path:
        return v3_directory(root / "hf", torch.float32)

    def new(self, lora: LoraSettings | None = None) -> Trainer:
        build = BuildOptions(lora=lora or self.lora, base=self.held)
        return Trainer(TrainingSpec(self.config, (whole_stage(self.config),), "1F1B", 8, 1, build), self.meshes)

    def save(self, root: Path) -> Path:
        state = TrainState(iteration=1, consumed_samples=1, optimizer_steps=1, batches=((1, 1),))
        return checkpoint.save(root, state, self.config, self.trainer.stages, self.trainer.optimizer,
                               notes={BASE: self.base.note(self.lora)},
                               complete=partial(add_adapter, self.config, self.lora, self.base))
