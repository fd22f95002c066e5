"""What an engine needs of a model: its modules with weights in them, and what belongs to its text."""

from dataclasses import dataclass

import torch

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.parallel.mesh import Meshes


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to answer, or this rank's part of one.

    `stage` is the training model in evaluation mode, without gradients: all layers, and the MTP modules if drafts were
    asked for, which `config` then announces. Its linear layers may hold FP8, NF4 or adapted weights (quantised.py).
    `dtype` is that of activations. `eos_ids` end a text. `defaults` are the model's own sampling.
    """

    stage: DeepseekStage
    config: ModelConfig
    meshes: Meshes
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer | None = None
    eos_ids: tuple[int, ...] = ()
    defaults: SamplingParameters = SamplingParameters()


def check_length(model: LoadedModel, settings: EngineSettings) -> None:
    """Raise ValueError if the engine's longest text is longer than the model can see."""
    limit, scaling = model.config.max_position_embeddings, model.config.rope_scaling
    if settings.max_length <= limit:
        return
    why = ": rope_scaling dynamic turns all earlier keys anew with each token beyond it, which a cache cannot" \
        if scaling is not None and scaling.kind == "dynamic" else ""
    raise ValueError(f"max_length {settings.max_length} is longer than the model's max_position_embeddings "
                     f"{limit}{why}")
