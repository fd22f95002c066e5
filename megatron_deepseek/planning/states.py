"""Memory of weights, gradients and moments on each rank, calculated from the table of parameters and the layout.

A parameter takes 4 bytes for its master weight, 4 for its reduced gradient and 8 for AdamW's two moments (4 with
moments in bfloat16). FSDP divides these among the data ranks; with --optimizer-cpu-offload they lie in the host's
memory. Not divided are 2 bytes for the gathered bfloat16 weight (4 without --bf16) and, where an update has several
micro-batches, 4 for the sum of their gradients, since they are reduced once. With optim_grads_params weights are
gathered for one layer at a time, which is left out here.

Activations, buffers of communication and what CUDA itself takes come on top.
"""

from dataclasses import dataclass

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import EMBEDDING, FINAL_NORM, Parameter, layer_total, outer_rows
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.parallel.schedule_rules import stages_of_rank
from megatron_deepseek.planning.pipeline_balance import resolve
from megatron_deepseek.settings import Settings


@dataclass(frozen=True)
class Held:
    """Parameters of a pipeline rank's stages that one rank holds, before FSDP divides them: dense ones and experts'."""

    dense: int
    experts: int


@dataclass(frozen=True)
class StateBytes:
    """Bytes on each rank of the pipeline rank `pp_rank`, on the device and in the host's memory."""

    pp_rank: int
    device: int
    host: int


def held_parameters(model: ModelConfig, layout: Layout, stages: list[Stage]) -> Held:
    """Return what a rank that holds `stages` keeps of them under tensor, expert and expert-tensor parallelism."""
    ranks = {TP: layout.tp, EP: layout.ep, ETP: layout.etp}

    def held(mesh: str) -> int:
        def measure(row: Parameter) -> int:
            return row.size // row.placement.parts(ranks) if row.trained and row.mesh == mesh else 0

        layers = [index for stage in stages
                  for index in (*stage.layers, *(model.num_hidden_layers + depth for depth in stage.mtp))]
        return (sum(layer_total(model, index, measure) for index in layers)
                + sum(measure(row) for stage in stages for row in outer_rows(model) if _holds(stage, row, model)))

    return Held(held("dense"), held("expert"))


def _holds(stage: Stage, row: Parameter, model: ModelConfig) -> bool:
    """Return whether a stage holds a row outside of layers: a tied head and MTP modules need the embedding too."""
    if row.name == EMBEDDING:
        return bool(stage.embedding or stage.mtp or (stage.loss and model.tie_word_embeddings))
    return model.num_hidden_layers - 1 in stage.layers if row.name == FINAL_NORM else stage.loss


def state_bytes(settings: "Settings") -> StateBytes:
    """Return the bytes of the pipeline rank with the most on its device."""
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
    """Return a line on what the fullest GPU holds."""
    most = state_bytes(settings)
    host = f", {most.host / 2**30:.1f} GiB of the host's memory for each rank" if most.host else ""
    return (f"weights, gradients and moments (calculated, docs/quickstart_cluster.md): at most "
            f"{most.device / 2**30:.1f} GiB on a GPU, of pipeline rank {most.pp_rank}{host}")
