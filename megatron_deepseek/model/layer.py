"""One transformer layer, the MTP module that wraps one, and the ways to run a layer for less memory.

Shapes: B batch, S sequence (local slice under sequence parallelism), H hidden, D rotary dimensions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.attention.gqa import GroupedQueryAttention
from megatron_deepseek.model.attention.mla import MLA
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.moe import MLP, MoE, RouterStats
from megatron_deepseek.model.positions import Positions
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.offload import saved_on_host
from megatron_deepseek.ops.recompute import keep, kept, recomputed
from megatron_deepseek.parallel.tensor import RMSNorm, TensorParallel, replicated_linear
from megatron_deepseek.settings import OffloadSettings, RecomputeSettings


class DecoderLayer(nn.Module):
    """One layer: h = x + attention(norm(x)), then h + MLP(norm(h)) or h + MoE(norm(h)). `index` is Hugging Face's."""

    def __init__(self, index: int, blueprint: Blueprint):
        super().__init__()
        config, tp = blueprint.config, blueprint.tp
        self.is_moe, self.place = config.is_moe_layer(index), config.place_among_moe(index)
        self.normed = recomputed if "layernorm" in blueprint.recomputed else kept
        recipe = blueprint.recipe
        only_products = config.q_lora_rank is not None or tp.size == 1  # else the input itself is gathered over TP
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp,
                                       recipe.norm if only_products else recipe.norm_for_all)
        self.self_attn = GroupedQueryAttention(index, blueprint) if config.grouped_query else MLA(blueprint)
        before_router = recipe.norm_for_all if config.n_shared_experts else rms_norm
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp,
                                                before_router if self.is_moe else recipe.norm)
        if self.is_moe:
            self.mlp = MoE(blueprint)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, tp, recipe.linear)

    def forward(self, x_BSH: torch.Tensor, positions: Positions, global_sequences: int,
                routed_BS: torch.Tensor | None = None) -> tuple[torch.Tensor, RouterStats | None]:
        with self.normed(self.input_layernorm, x_BSH) as normed_BSH:
            x_BSH = x_BSH + self.self_attn(normed_BSH, positions)
        with self.normed(self.post_attention_layernorm, x_BSH) as normed_BSH:
            if not self.is_moe:
                return x_BSH + self.mlp(normed_BSH, positions.keys.own_BS), None
            y_BSH, stats = self.mlp(normed_BSH, global_sequences, routed_BS, positions.keys.own_BS,
                                    positions.replay.of_layer(self.place))
        return x_BSH + y_BSH, stats


class SharedHead(nn.Module):
    """The norm before the output head; an MTP module has its own, while the head is the main model's."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)


class MTPLayer(DecoderLayer):
    """Multi-Token Prediction, one depth (arXiv 2412.19437, section 2.2).

    At position i depth k joins the previous depth's state with the embedding of token i + k. `eh_proj` takes the
    embedding first, which is the order of the released weights, not the paper's. The next depth gets the state after
    its norm, as the first depth gets the main model's.
    """

    def __init__(self, index: int, blueprint: Blueprint):
        super().__init__(index, blueprint)
        config, tp = blueprint.config, blueprint.tp
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.tp = tp
        self.eh_proj = replicated_linear(2 * config.hidden_size, config.hidden_size, tp)
        self.shared_head = SharedHead(config, tp)

    def forward(self, state_BSH: torch.Tensor, embedding_BSH: torch.Tensor, positions: Positions,
                global_sequences: int, routed_BS: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, RouterStats | None]:
        joined = torch.cat([self.enorm(embedding_BSH), self.hnorm(state_BSH)], -1)
        joined = self.eh_proj(joined, self.tp.stream_keys(positions.keys.own_BS))
        x_BSH, stats = super().forward(joined, positions, global_sequences, routed_BS)
        return self.shared_head.norm(x_BSH), stats


def run_layer(layer: nn.Module, *args):
    """Run the layer and keep what its backward needs."""
    return layer(*args)


def run_checkpointed(layer: nn.Module, *args):
    """Run the layer, keep only its inputs, and run it again in the backward (full recomputation)."""
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)


def run_offloaded(layer: nn.Module, *args):
    """Run the layer and keep what its backward needs, except the weights, in the host's memory."""
    if not _has_backward(layer, args):
        return layer(*args)
    with saved_on_host(partial(_is_weight, layer)):
        return layer(*args)


def run_checkpointed_offloaded(layer: nn.Module, *args):
    """Run the layer, keep only its inputs, in the host's memory, and run it again in the backward."""
    if not _has_backward(layer, args):
        return layer(*args)
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    with saved_on_host(lambda tensor: False):
        fetch = keep(tuple(tensors))
    given = [args]  # the first run takes the arguments from here, since `checkpoint` would keep its own alive

    def run():
        if given:
            return layer(*given.pop())
        fetched = iter(fetch())
        return layer(*(next(fetched) if kept else arg for kept, arg in others))

    others = [(True, None) if isinstance(arg, torch.Tensor) else (False, arg) for arg in args]
    return checkpoint(run, use_reentrant=False, preserve_rng_state=False)


def _has_backward(layer: nn.Module, args: tuple) -> bool:
    """Return whether there will be a backward; there is none where the layer and all before it are frozen."""
    return any(getattr(each, "requires_grad", False) for each in (*args, *layer.parameters()))


def _is_weight(layer: nn.Module, tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is in the memory of one of the layer's parameters as they are now, gathered by FSDP."""
    own = tensor.untyped_storage()._cdata
    return any(own == getattr(p, "_local_tensor", p).untyped_storage()._cdata for p in layer.parameters())


def choose_run(recompute: RecomputeSettings, offload: OffloadSettings, position: int) -> Callable:
    """Return the function that runs the layer at `position` of its stage, one of the four above."""
    plain, offloaded = (run_checkpointed, run_checkpointed_offloaded) if recompute.granularity == "full" else (
        run_layer, run_offloaded)
    return offloaded if position < offload.cpu_offloading_num_layers else plain
