"""What a job is for, as far as its memory is concerned: all weights trained, adapters alone, with a rollout engine
beside the training, or none trained and a cache for users.

    pretrain, finetune   all weights, gradients and moments
    lora                 base weights in bf16, frozen; adapters of `lora_rank` beside every large dense product
    qlora                the same with the base as NF4, half a byte and scales (arXiv 2305.14314); one layer at a time
                         is made bf16
    grpo                 finetune, a reference policy, and an engine's own weights and cache on the same GPUs
    serve                weights and cache, no gradients
"""

from dataclasses import dataclass

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.parameters import layer_rows
from megatron_deepseek.model.architecture.placements import EP, ETP, TP
from megatron_deepseek.planning.activations import layer, total
from megatron_deepseek.planning.attention_activations import travelling_width
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.state_bytes import Divided, StateParts, data_ranks, largest_unit
from megatron_deepseek.planning.held_parameters import held_parameters

NAMES = ("pretrain", "finetune", "lora", "qlora", "grpo", "serve")
NF4 = 0.5 + 0.127 / 8  # bytes of a weight with its share of doubly quantised scales
CACHE_ELEMENT = 2  # bytes of a number in the cache


@dataclass(frozen=True)
class Task:
    """`users` conversations of `context` tokens are cached by all ranks together (serve), or by each rollout engine of
    `rollout_ranks` ranks (grpo). `weight_bytes`: of a weight that serves. `reference`: a frozen copy is kept too.
    """

    name: str = "pretrain"
    lora_rank: int = 16
    users: int = 1
    context: int = 4096
    rollout_ranks: int = 1
    weight_bytes: float = 2
    reference: bool = True

    @property
    def trains(self) -> bool:
        """Return whether there are gradients."""
        return self.name != "serve"


def cache_bytes_of_token(model: ModelConfig) -> int:
    """Return what all layers cache of a token: MLA's latent and turned shared key, [kv_lora_rank + rope] each, or the
    heads of keys and values.
    """
    return model.num_hidden_layers * travelling_width(model, model.num_kv_heads) * CACHE_ELEMENT


def extra_bytes(job: Job, task: Task, pp_rank: int) -> dict[str, float]:
    """Return what a rank holds beside its states and activations, by name."""
    model, layout = job.model, job.layout
    tokens = task.users * task.context
    if task.name == "serve":
        layers = sum(len(job.stages[stage].layers) for stage in job.held(pp_rank)) / model.num_hidden_layers
        return {"cache": tokens * cache_bytes_of_token(model) * layers / (layout.dp * layout.cp)}
    if task.name != "grpo":
        return {}
    held = held_parameters(model, layout, [job.stages[stage] for stage in job.held(pp_rank)])
    dense, experts = data_ranks(job)
    found = {"rollout engine: weights": 2 * model.main_parameters() / task.rollout_ranks,
             "rollout engine: cache": tokens * cache_bytes_of_token(model) / task.rollout_ranks}
    if task.reference:
        found["reference policy"] = 2 * (held.dense / dense + held.experts / experts)
    return found


def states_of_task(job: Job, task: Task, pp_rank: int, trained: StateParts) -> StateParts:
    """Return the states of a task, given those of a job that trains all weights."""
    if task.name in ("lora", "qlora"):
        return _adapters(job, task, pp_rank)
    if task.name == "serve":
        held = held_parameters(job.model, job.layout, [job.stages[stage] for stage in job.held(pp_rank)])
        weights = Divided(held.dense * task.weight_bytes, held.experts * task.weight_bytes)
        return StateParts(weights, Divided(), Divided(), Divided(), Divided())
    return trained


def adapter_parameters(model: ModelConfig, job: Job, index: int, rank: int) -> int:
    """Return how many weights adapters of `rank` have on this rank beside layer `index`: A [rank, in], B [out, rank]
    for each product of attention and of dense or shared MLPs, divided as their base is.
    """
    ranks = {TP: job.layout.tp, EP: job.layout.ep, ETP: job.layout.etp}
    total_size = 0
    for row in layer_rows(model, index):
        if row.gemms and len(row.shape) == 2 and row.mesh == "dense" and ".mlp.gate." not in row.name:
            total_size += rank * sum(row.placement.local_shape(row.shape, ranks))
    return total_size


def _adapters(job: Job, task: Task, pp_rank: int) -> StateParts:
    """Return a frozen base, divided among data ranks and gathered whole (NF4: by the layer), and trained adapters."""
    held = held_parameters(job.model, job.layout, [job.stages[stage] for stage in job.held(pp_rank)])
    dense, experts = data_ranks(job)
    adapters = sum(adapter_parameters(job.model, job, index, task.lora_rank)
                   for stage in job.held(pp_rank) for index in job.layers_of(stage))
    base, element = NF4 if task.name == "qlora" else 2, job.numbers.element
    gathered = largest_unit(job, pp_rank, element, 2) if task.name == "qlora" else Divided(
        held.dense * element, held.experts * element)
    sums = 4 if job.micro_batches > 1 else 0
    return StateParts(
        weights=Divided(held.dense * base / dense + adapters * 4 / dense, held.experts * base / experts),
        gathered=Divided(gathered.dense + adapters * element, gathered.experts),
        gradients=Divided(adapters * sums), reduced=Divided(adapters * 4 / dense),
        optimizer=Divided(adapters * 8 / dense))


def working_bytes(job: Job, imbalance: float) -> float:
    """Return what a forward without a backward needs at once: at most all that its largest layer makes."""
    shapes = job.shapes(imbalance)
    kinds = {job.model.is_moe_layer(index): index for index in range(job.model.num_hidden_layers)}
    return max(total(layer(shapes, index)) for index in kinds.values())
