"""What a job is for, as far as its memory is concerned: all weights trained, adapters alone, with a rollout engine
beside the training, or none trained and a cache for users.

    pretrain, finetune   all weights, gradients and moments
    lora                 base weights in bf16, frozen, or in the form of `base`; adapters beside the layers of `lora`
    qlora                the same with the base as NF4 with quantised scales (arXiv 2305.14314), which data ranks
                         gather by the layer (optim_grads_params)
    grpo                 finetune, a reference policy, and an engine's own weights and cache on the same GPUs
    serve                weights and cache, no gradients
"""

from dataclasses import dataclass, replace

from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.base_weights import NF4_BITS, BaseSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.planning.activations import layer, total
from megatron_deepseek.planning.attention_activations import travelling_width
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.state_bytes import Divided, StateParts, adapter_parts, data_ranks
from megatron_deepseek.planning.held_parameters import held_parameters
from megatron_deepseek.settings import Settings

NAMES = ("pretrain", "finetune", "lora", "qlora", "grpo", "serve")
CACHE_ELEMENT = 2  # bytes of a number in the cache


@dataclass(frozen=True)
class Task:
    """`users` conversations of `context` tokens are cached by all ranks together (serve), or by each rollout engine of
    `rollout_ranks` ranks (grpo). `weight_bytes`: of a weight that serves. `reference`: a frozen copy is kept too.
    `lora`: the adapters of lora and qlora; `base`: what their base is kept as, None for bf16 and
    NF4.
    """

    name: str = "pretrain"
    lora: LoraSettings = LoraSettings(16, 32.0)
    base: BaseSettings | None = None
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
        part = held.padded
        found["reference policy"] = 2 * (part.dense / dense + part.experts / experts)
    return found


def states_of_task(job: Job, task: Task, pp_rank: int, trained: StateParts) -> StateParts:
    """Return the states of a task, given those of a job that trains all weights."""
    if task.name in ("lora", "qlora"):
        return adapter_parts(job, pp_rank)
    if task.name == "serve":
        held = held_parameters(job.model, job.layout, [job.stages[stage] for stage in job.held(pp_rank)])
        weights = Divided(held.dense * task.weight_bytes, held.experts * task.weight_bytes)
        return StateParts(weights, Divided(), Divided(), Divided(), Divided())
    return trained


def with_adapters(job: Job, task: Task) -> Job:
    """Return the job of a task: with its adapters, where these alone are trained."""
    if task.name not in ("lora", "qlora"):
        return job
    return replace(job, settings=_with_adapters(job.settings, task), frozen_base=True)


def _with_adapters(settings: Settings, task: Task) -> Settings:
    if task.name == "lora":
        return replace(settings, lora=task.lora, base=task.base)
    run = replace(settings.run, sharding="optim_grads_params")
    return replace(settings, lora=task.lora, base=task.base or BaseSettings(NF4_BITS), run=run)


def working_bytes(job: Job, imbalance: float) -> float:
    """Return what a forward without a backward needs at once: at most all that its largest layer makes."""
    shapes = job.shapes(imbalance)
    kinds = {job.model.is_moe_layer(index): index for index in range(job.model.num_hidden_layers)}
    return max(total(layer(shapes, index)) for index in kinds.values())
