"""Memory of weights, gradients and moments on each rank, calculated from the architecture and the layout; no torch.

A parameter takes 4 bytes for its master weight, 4 for its reduced gradient and 8 for AdamW's two moments (4 with
moments in bfloat16). FSDP divides these among the data ranks; with --optimizer-cpu-offload they lie in the host's
memory. Not divided are 2 bytes for the gathered bfloat16 weight (4 without --bf16) and, where an update has several
micro-batches, 4 for the sum of their gradients, since they are reduced once. With optim_grads_params weights are
gathered for one layer at a time, which is left out here.

Activations, buffers of communication and what CUDA itself takes come on top.
"""

from dataclasses import dataclass

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import Settings


@dataclass(frozen=True)
class Held:
    """Parameters of one pipeline rank's stages on one rank, before FSDP divides them: dense ones, routed experts'."""

    dense: int
    experts: int


@dataclass(frozen=True)
class StateBytes:
    """Bytes on each rank of the pipeline rank `pp_rank`, on the device and in the host's memory."""

    pp_rank: int
    device: int
    host: int


def held_parameters(model: ModelConfig, layout: Layout, stages: list[Stage]) -> Held:
    """What a rank that holds `stages` keeps of them under tensor, expert and expert-tensor parallelism."""
    dense = experts = 0
    vocabulary = model.vocab_size * model.hidden_size // layout.tp
    for stage in stages:
        layers = [*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp)]
        for index in layers:
            routed = _routed(model) if model.is_moe_layer(index) else 0
            experts += routed // (layout.ep * layout.etp)
            whole, divided = model.layer_parameters(index) - routed, _divided(model, index)
            dense += whole - divided + divided // layout.tp
        dense += len(stage.mtp) * (model.mtp_parameters() - model.layer_parameters(model.num_hidden_layers))
        tied = model.tie_word_embeddings and stage.loss
        dense += vocabulary * bool(stage.embedding or stage.mtp or tied)
        dense += (vocabulary * (not model.tie_word_embeddings) + model.hidden_size) * stage.loss
    return Held(dense, experts)


def _routed(model: ModelConfig) -> int:
    return 3 * model.hidden_size * model.moe_intermediate_size * model.n_routed_experts


def _divided(model: ModelConfig, index: int) -> int:
    """How many dense weights of a layer tensor ranks divide: those of products by heads and by the MLP's width."""
    heads = model.num_attention_heads
    query = model.q_lora_rank or model.hidden_size
    attention = heads * (query * model.qk_head_dim + model.v_head_dim * model.hidden_size
                         + model.kv_lora_rank * (model.qk_nope_head_dim + model.v_head_dim))
    width = model.n_shared_experts * model.moe_intermediate_size if model.is_moe_layer(index) \
        else model.intermediate_size
    return attention + 3 * model.hidden_size * width


def state_bytes(settings: "Settings") -> StateBytes:
    """The bytes of the pipeline rank with the most on its device."""
    return max((_of_rank(settings, pp_rank) for pp_rank in range(settings.layout.pp)), key=lambda each: each.device)


def _of_rank(settings: "Settings", pp_rank: int) -> StateBytes:
    layout, batch = settings.layout, settings.batch
    stages = resolve(settings.model, settings.pipeline, layout.pp, settings.data.seq_length)
    mine = stages_of_rank(pp_rank, len(stages), layout.pp, settings.pipeline.schedule)
    held = held_parameters(settings.model, layout, [stages[index] for index in mine])
    moments = sum(2 if dtype == "bf16" else 4
                  for dtype in (settings.optimizer.exp_avg_dtype, settings.optimizer.exp_avg_sq_dtype))
    divided = (8 + moments) * (held.dense // (layout.dp * layout.cp) + held.experts // layout.edp)
    gathered = (2 if settings.run.bf16 else 4) if settings.run.sharding == "optim_grads" else 0
    several = batch.global_batch_size > batch.micro_batch_size * layout.dp
    whole = (gathered + 4 * several) * (held.dense + held.experts)
    host = divided if settings.offload.optimizer_cpu_offload else 0
    return StateBytes(pp_rank, whole + divided - host, host)


def describe_states(settings: "Settings") -> str:
    most = state_bytes(settings)
    host = f", {most.host / 2**30:.1f} GiB of the host's memory for each rank" if most.host else ""
    return (f"weights, gradients and moments (calculated, docs/quickstart_cluster.md): at most "
            f"{most.device / 2**30:.1f} GiB on a GPU, of pipeline rank {most.pp_rank}{host}")
