"""The trained parameters of a stage, unit by unit of FSDP, as a backward sums and reduces their gradients."""

from megatron_deepseek.parallel.layout_string import Stage
from megatron_deepseek.planning.gathered_units import part_of
from megatron_deepseek.planning.held_parameters import Held, together
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.stage_states import NOTHING, trained


def units_of_layer(job: Job, index: int) -> tuple[Held, Held]:
    """Return the trained parameters of a layer but for routed experts, and those of these."""
    held = trained(job, part_of(job, index))
    outside = trained(job, Stage(True, (), (), False)) if index >= job.model.num_hidden_layers else NOTHING
    last = job.model.num_hidden_layers - 1 == index
    norm = job.model.hidden_size if last else 0
    dense = Held(max(0, held.dense - outside.dense - norm), 0, held.dense_padding - outside.dense_padding)
    return dense, Held(0, held.experts, 0, held.experts_padding)


def outside_of_layers(job: Job, stage: int) -> Held:
    """Return the trained parameters of a stage that are in none of its layers."""
    held = trained(job, job.stages[stage])
    layers = together([units_of_layer(job, index)[0] for index in job.layers_of(stage)])
    return Held(held.dense - layers.dense, 0, held.dense_padding - layers.dense_padding)


def largest_outside(job: Job, stage: int) -> int:
    """Return the parameters of the larger one of embedding and head, as far as a stage holds them and trains them."""
    part = job.stages[stage]
    parts = Stage(bool(part.embedding or part.mtp), (), (), False), Stage(False, (), (), part.loss)
    return max(trained(job, each).dense for each in parts)


def uses_of_embedding(job: Job, stage: int) -> int:
    """Return how often a stage uses the embedding: for its tokens, for those of MTP modules, and as a tied head."""
    part = job.stages[stage]
    return part.embedding + len(part.mtp) + (part.loss and job.model.tie_word_embeddings)


def units_of_stage(job: Job, stage: int) -> list[Held]:
    """Return the trained parameters of each unit of a stage, in the order of its modules."""
    layers = (units_of_layer(job, index) for index in job.layers_of(stage))
    return [outside_of_layers(job, stage), *(unit for units in layers for unit in units)]


def of_last_mlp(job: Job, index: int) -> int:
    """Return the parameters of a layer's dense MLP, or of its shared experts, on a rank, where these are its last: an
    MTP module ends with a norm.
    """
    model = job.model
    if index >= model.num_hidden_layers:
        return 0
    width = model.n_shared_experts * model.moe_intermediate_size if model.is_moe_layer(index) else \
        model.intermediate_size
    return 3 * model.hidden_size * width // job.layout.tp
