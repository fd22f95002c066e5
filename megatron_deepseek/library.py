"""Functions for notebooks and scripts: from an architecture to a trainer in one call (docs/library.md).

The commands take another way, from arguments to settings; both end in the same Trainer.
"""

import torch.distributed as dist

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.parallel.start import choose_device, join_job
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import OptimizerSettings, PipelineSettings
from megatron_deepseek.training.objective import Objective
from megatron_deepseek.training.trainer import Trainer, TrainingSpec


def start_job(layout: Layout = Layout(), timeout_minutes: float = 10.0) -> Meshes:
    """Join the job that torchrun started, or make one of this process alone, and return the process groups of `layout`.

    A job that was joined before is used again. Raise ValueError if it has another number of ranks than the layout.
    """
    device = choose_device()
    if not dist.is_initialized():
        join_job(device, timeout_minutes)
    return build_meshes(layout, device)


def make_trainer(config: ModelConfig, seq_length: int, micro_batch_size: int = 1, layout: Layout = Layout(), *,
                 pipeline: PipelineSettings = PipelineSettings(), build: BuildOptions = BuildOptions(),
                 optimizer: OptimizerSettings = OptimizerSettings(), objective: Objective | None = None) -> Trainer:
    """Return a trainer of a freshly initialised model. In a job of several ranks every rank must call this.

    Without an `objective` it pre-trains. `trainer.stages` are this rank's parts of the model; on a single rank they are
    the whole model.
    """
    stages = resolve(config, pipeline, layout.pp, seq_length)
    spec = TrainingSpec(config, stages, pipeline.schedule, seq_length, micro_batch_size, build, optimizer)
    return Trainer(spec, start_job(layout), objective)
