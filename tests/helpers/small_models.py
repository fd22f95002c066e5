"""Whole models on one rank, small enough to be compared number by number."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.build import BuildOptions, Precision, build_stages
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.shifts import shifted_labels
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext, StepStatistics
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.training.next_token import NextToken

V2_SMALL = ModelConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, moe_intermediate_size=12, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1, n_group=4, topk_group=2,
    topk_method="group_limited_greedy", scoring_func="softmax", routed_scaling_factor=2.0)
V3_SMALL = ModelConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8,
    q_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, moe_intermediate_size=12,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1, n_group=4, topk_group=2,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5)
LLAMA_SMALL = ModelConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4)


def whole_stage(config: ModelConfig) -> Stage:
    return Stage(embedding=True, layers=tuple(range(config.num_hidden_layers)),
                 mtp=tuple(range(config.num_nextn_predict_layers)), loss=True)


def whole_model(config: ModelConfig, meshes: Meshes, seq_length: int, dtype: torch.dtype = torch.float64,
                **options) -> DeepseekStage:
    """The model on one rank with its own initial weights; `options` are BuildOptions'."""
    options = BuildOptions(**{"seed": 1, "precision": Precision(dtype)} | options)
    (model,) = build_stages(config, [whole_stage(config)], meshes, seq_length, options)
    return model


def lively(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights large enough that a mistake anywhere changes every output; norms differ from one, biases from zero."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    return (0.1 if len(shape) == 1 else 0.25) * noise


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, and the buffers that are saved with them."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()}


def enliven(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter and router bias of any model (ours, transformers') lively values."""
    generator = torch.Generator().manual_seed(seed)
    load(model, {name: lively(name, tensor.shape, generator) for name, tensor in tensors(model).items()})


@torch.no_grad()
def load(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights` into a model; both must have the same names and shapes."""
    own = tensors(model)
    assert own.keys() == weights.keys(), sorted(own.keys() ^ weights.keys())
    for name, tensor in own.items():
        assert tensor.shape == weights[name].shape, (name, tensor.shape, weights[name].shape)
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local.copy_(weights[name])


def weights_of(model: torch.nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Whole copies of parameters and router biases, detached."""
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors(model).items()}
    return {name: tensor.detach().to(dtype).clone() for name, tensor in whole.items()}


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


def random_batch(config: ModelConfig, batch: int, seq_length: int, seed: int = 0
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, next-token labels and a label mask with holes, [B, S] each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch, seq_length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:], torch.rand(batch, seq_length, generator=generator) < 0.8


def training_batch(tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, **more) -> Batch:
    """What a trainer takes, of what `random_batch` gives; `more` are further fields of Batch."""
    return Batch(tokens_BS=tokens, labels_BS=labels, weights_BS=mask.float(), **more)


@dataclass
class Outcome:
    """What one forward of a whole model left: the loss that is back-propagated, the logits of each depth, and what its
    layers count.
    """

    loss: torch.Tensor
    logits: list[torch.Tensor]
    statistics: StepStatistics

    @property
    def losses(self) -> list[float]:
        """Of the main prediction and each MTP depth."""
        return [loss.item() for loss in self.statistics.reports.values()]


def forward(model: DeepseekStage, tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor,
            mtp_scale: float = 0.1) -> Outcome:
    """The batch as a step of one micro-batch."""
    objective = NextToken(model.config.num_nextn_predict_layers, mtp_scale)
    rows = Rows(*shifted_labels(labels, mask.float(), objective.num_depths))
    step = StepContext(tokens.shape[0], partial(objective.contribution, counts=objective.counts(rows)))
    logits, compute = [], model.head.log_probabilities

    def record(state, *of):
        logits.append(model.logits(state).detach())
        return compute(state, *of)

    model.head.log_probabilities = record
    try:
        loss = model(tokens, MicroBatch(rows), step)
    finally:
        del model.head.log_probabilities
    return Outcome(loss, logits, step.statistics)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected number: what one rounding error is a share of."""
    expected = expected.detach().double()
    difference = (got.detach().double() - expected).abs().max()
    return (difference / expected.abs().max().clamp(min=1e-30)).item()
