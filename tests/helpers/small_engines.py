"""Engines over small models with weights of spread, so that no two tokens are equally likely."""

from dataclasses import replace

import torch
from small_models import LLAMA_SMALL, V2_SMALL, V3_SMALL, tensors, whole_stage

from megatron_deepseek.inference.engine import Engine
from megatron_deepseek.inference.loaded_model import LoadedModel
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.rope_scaling import RopeScaling
from megatron_deepseek.model.build import BuildOptions, Precision, shape_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext
from megatron_deepseek.parallel.mesh import Meshes

YARN = RopeScaling(kind="yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)
V3_MTP = replace(V3_SMALL, num_nextn_predict_layers=1, rope_scaling=YARN, max_position_embeddings=128)
V2_LITE = replace(V2_SMALL, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy", n_shared_experts=2,
                  routed_scaling_factor=1.0)
QWEN = replace(LLAMA_SMALL, num_nextn_predict_layers=1, qk_norm=True)
WINDOWED = replace(LLAMA_SMALL, qkv_bias=True, sliding_window=6, layer_types=("full_attention", "sliding_attention"))


def spread(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random weights of a size at which a layer changes its input as much as in a trained model.

    With the small initial weights of training, or a few steps of it, the likeliest token is often a tie.
    """
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if len(shape) == 1:
        return 0.05 * noise
    if "embed_tokens" in name:
        return noise
    return noise * (3 if "lm_head" in name else 1.3) / shape[-1]**0.5


@torch.no_grad()
def spread_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every weight of any model (ours, transformers') its spread values, which depend on the seed and its name."""
    for name, tensor in tensors(model).items():
        generator = torch.Generator().manual_seed(hash_of(name) + seed)
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local.copy_(spread(name, tensor.shape, generator))


def hash_of(name: str) -> int:
    return sum((place + 1) * ord(character) for place, character in enumerate(name)) * 1000


def loaded(config: ModelConfig, meshes: Meshes, dtype: torch.dtype = torch.float32, seed: int = 0, **more
           ) -> LoadedModel:
    """A whole model on this rank; `more` are further fields of LoadedModel."""
    (stage,) = shape_stages(config, [whole_stage(config)], meshes, 100, BuildOptions(precision=Precision(dtype)))
    stage.to_empty(device="cpu")
    spread_weights(stage, seed)
    return LoadedModel(stage.eval().requires_grad_(False), config, meshes, torch.device("cpu"), dtype, **more)


def engine(model: LoadedModel, **settings) -> Engine:
    return Engine(model, EngineSettings(**{"max_length": 100, "block_size": 4} | settings))


@torch.no_grad()
def uncached_states(model: DeepseekStage, tokens: list[int]) -> list[torch.Tensor]:
    """The states [S, H] of the main model and each MTP depth, by the training model's own forward.

    Those of a depth are right for tokens that have as many after them.
    """
    ids_1S = torch.tensor([tokens + [0] * (model.rope_2SD.shape[1] - len(tokens))])  # a causal model does not mind
    labels = [ids_1S.roll(-1 - depth, 1) for depth in range(1 + model.config.num_nextn_predict_layers)]
    labels_1MS = torch.stack(labels, 1)
    states = model.states(ids_1S, MicroBatch(Rows(labels_1MS, torch.zeros(labels_1MS.shape))), StepContext(1))
    return [state[0, :len(tokens)] for state in states]


def uncached_logits(model: DeepseekStage, tokens: list[int]) -> torch.Tensor:
    """The logits [S, V] after every token."""
    with torch.no_grad():
        return model.logits(uncached_states(model, tokens)[0].unsqueeze(0))[0]
