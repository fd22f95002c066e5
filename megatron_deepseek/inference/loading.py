"""Loads a model to answer with, each rank its own part: of checkpoints of any layout, or a Hugging Face directory.

The modules are training's, on whatever ranks there are; nothing is converted or resharded beforehand. Weights are plain
(float32 or bfloat16), FP8 as they were released, or NF4; a LoRA adapter may stand beside them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.checkpoint.adapter.peft_files import Adapter
from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.inference import held_loading
from megatron_deepseek.inference.adapter import attach
from megatron_deepseek.inference.loaded_model import LoadedModel
from megatron_deepseek.inference.model_files import FORMS, NF4, PLAIN, ModelFiles, check_dtype
from megatron_deepseek.inference.packed import pack
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import shape_whole
from megatron_deepseek.model.compiled import BACKEND, check_compiler, compile_stages
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How a model is loaded. What is None is as the files have it.

    `dtype`: what is computed in. `form`: how the weights of linear layers are kept, one of "plain", "fp8" and "nf4";
    `double_quantization`: the scales of NF4 are quantised too. `max_length`: of a text, in tokens; None for all that
    the model can. `adapter`: a directory of PEFT. `compile`: functions of the layers are
    compiled by torch.compile (model/compiled.py).
    """

    dtype: torch.dtype | None = None
    form: str | None = None
    double_quantization: bool = False
    max_length: int | None = None
    adapter: Path | None = None
    compile: bool = False

    def __post_init__(self):
        if self.form is not None and self.form not in FORMS:
            raise ValueError(f"weights {self.form!r} is not one of {', '.join(FORMS)}")
        if self.double_quantization and self.form != NF4:
            raise ValueError("double_quantization is of weights nf4")
        if self.dtype is not None:
            check_dtype(self.dtype)


def join_ranks(layout: Layout = Layout(), timeout_minutes: float = 10) -> Meshes:
    """Join the job that torchrun started, or make one of this process alone; return the process groups of `layout`.

    A job that was joined before is used again. Ranks wait for each other at most `timeout_minutes`. Raise ValueError
    for a layout that answering has no use for, or of another number of ranks.
    """
    if layout.pp > 1 or layout.cp > 1 or layout.etp > 1 or layout.sequence_parallel:
        raise ValueError("models answer with tensor, expert and data parallelism alone: pipeline, context and "
                         "expert-tensor ranks, and sequence parallelism, must be 1 or off")
    device = choose_device()
    if not dist.is_initialized():
        join_job(device, timeout_minutes)
    return build_meshes(layout, device)


def load_model(files: ModelFiles, meshes: Meshes, settings: LoadSettings = LoadSettings()) -> LoadedModel:
    """Build this rank's part of the model and load its weights; every rank calls it.

    Raise ValueError, of one line, for a model that these ranks cannot share, or whose files turn out to be damaged.
    """
    config, dtype, form = files.config, settings.dtype or files.dtype, settings.form or files.form
    max_length = checked_length(config, settings.max_length)
    mtp = config.num_nextn_predict_layers > 0
    adapter = Adapter.read(settings.adapter, mtp=mtp) if settings.adapter is not None else None
    stage = shape_whole(config, meshes, max_length, dtype)
    targets = held_loading.take_out(stage, files.source) if form != PLAIN else []
    stage.to_empty(device=meshes.device)
    checkpoint.load_weights(files.directory, [stage])
    held_loading.fill(targets, files.source, form, meshes.device, settings.double_quantization)
    if adapter is not None:
        attach(adapter, stage, meshes, dtype)
    make_local(stage)
    pack(stage)
    if settings.compile:
        check_compiler(meshes.device)
        compile_stages([stage], BACKEND, meshes.device)
    return LoadedModel(stage.eval().requires_grad_(False), config, meshes, meshes.device, dtype, files.tokenizer,
                       files.eos_ids, files.defaults)


def checked_length(config: ModelConfig, max_length: int | None, name: str = "--seq-length") -> int:
    """Return the longest text in tokens; raise ValueError, with the option's name, if the model cannot see so much."""
    most = config.max_position_embeddings
    if max_length is not None and max_length > most:
        raise ValueError(f"{name} {max_length} is longer than the model's max_position_embeddings {most}")
    return max_length or most


def make_local(stage: nn.Module) -> None:
    """Replace every DTensor by this rank's shard: layers compute with that, and DTensor's dispatch takes time."""
    for module in stage.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(module, name, nn.Parameter(parameter.detach().to_local(), requires_grad=False))
