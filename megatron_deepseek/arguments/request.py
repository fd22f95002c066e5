"""A command line's request: its arguments, with the quantities that decide whether they fit together."""

import math
from argparse import Namespace
from dataclasses import dataclass

from megatron_deepseek.arguments.auto_layout import given_beside
from megatron_deepseek.arguments.data_paths import data_paths
from megatron_deepseek.model.architecture import adapters
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.architecture.freezing import matches_nothing
from megatron_deepseek.parallel import layout_string, schedule_rules
from megatron_deepseek.parallel.layout import nodes_divide
from megatron_deepseek.settings import BatchSettings
from megatron_deepseek.training import timeline

_OF_LORA = ("lora_alpha", "lora_target", "lora_rs", "lora_dropout", "lora_plus_ratio", "save_adapter",
            "load_adapter", "adapter_for")


@dataclass(frozen=True)
class Request:
    """Parsed arguments, the architecture that they give and the number of ranks.

    The properties are meaningful in the order of the validation rules: each relies on what was checked before it.
    """

    args: Namespace
    model: ModelConfig
    world_size: int
    local_world_size: int | None = None

    @property
    def fine_tunes(self) -> bool:
        """Return whether these are arguments of fine-tuning."""
        return hasattr(self.args, "dataset")

    @property
    def reinforces(self) -> bool:
        """Return whether these are arguments of reinforcement learning."""
        return hasattr(self.args, "prompts")

    @property
    def pretrains(self) -> bool:
        return not (self.fine_tunes or self.reinforces)

    @property
    def entry(self) -> str:
        return "pretrain_deepseek.py" if self.pretrains else "train_grpo.py" if self.reinforces else \
            "finetune_deepseek.py"

    @property
    def tp(self) -> int:
        return self.args.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.args.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        return self.args.context_parallel_size

    @property
    def ep(self) -> int:
        return self.args.expert_model_parallel_size

    @property
    def etp(self) -> int:
        return self.args.expert_tensor_parallel_size

    @property
    def fewest_ranks(self) -> int:
        """Return the least number of ranks that the sizes of the layout divide."""
        return self.pp * math.lcm(self.tp * self.cp, self.ep * self.etp)

    @property
    def dividing_sizes(self) -> str:
        """Return the arguments that ask for more ranks than one, as they were typed."""
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
                 "expert_model_parallel_size", "expert_tensor_parallel_size")
        return " ".join(f"--{name.replace('_', '-')} {getattr(self.args, name)}" for name in names
                        if getattr(self.args, name) > 1)

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def stage_ranks(self) -> int:
        """Return the number of ranks that share one pipeline stage; the experts spread over them."""
        return self.world_size // self.pp

    @property
    def ranks_per_node(self) -> int:
        return self.args.moe_ranks_per_node or self.local_world_size or self.world_size

    @property
    def nodes_divide_expert_groups(self) -> bool:
        """Return whether an expert group lies on one node, or on whole nodes."""
        return nodes_divide(self.ep, self.etp, self.ranks_per_node)

    @property
    def shared_width(self) -> int:
        return self.model.n_shared_experts * self.model.moe_intermediate_size

    @property
    def stage_count(self) -> int:
        """Return the number of pipeline stages of all ranks together."""
        if self.args.pipeline_model_parallel_layout is not None:
            return layout_string.count_stages(self.args.pipeline_model_parallel_layout)
        if self.args.num_layers_per_virtual_pipeline_stage is not None:
            return self.split_parts // self.args.num_layers_per_virtual_pipeline_stage
        if self.args.num_virtual_stages_per_pipeline_rank is not None:
            return self.pp * self.args.num_virtual_stages_per_pipeline_rank
        return self.pp * (schedule_rules.VIRTUAL_STAGES[self.args.pipeline_schedule or "1F1B"] if self.pp > 1 else 1)

    @property
    def virtual_stages(self) -> int:
        return self.stage_count // self.pp

    @property
    def schedule(self) -> str:
        return self.args.pipeline_schedule or ("Interleaved1F1B" if self.virtual_stages > 1 else "1F1B")

    @property
    def layout(self) -> str | None:
        """Return the layout string that was given, or that of given numbers of layers; None for neither."""
        layers = self._layers_of_stages
        if layers is None:
            return self.args.pipeline_model_parallel_layout
        stages = "|".join("t" * number for number in layers)
        return f"E{stages}{'m' * self.model.num_nextn_predict_layers}L"

    @property
    def accounted(self) -> str:
        """Return the arguments by which the embedding or the loss counts as a layer in the division, as typed."""
        return " ".join(f"--account-for-{part}-in-pipeline-split" for part in ("embedding", "loss")
                        if getattr(self.args, f"account_for_{part}_in_pipeline_split"))

    @property
    def split_parts(self) -> int:
        """Return what is divided among the stages: the layers, and what else counts as one."""
        return self.model.num_hidden_layers + len(self.accounted.split())

    @property
    def split_text(self) -> str:
        """Return the number of layers as it was typed, with what else counts as one."""
        layers = f"--num-layers {self.model.num_hidden_layers}"
        return f"{layers} with {self.accounted} ({self.split_parts} in all)" if self.accounted else layers

    @property
    def _layers_of_stages(self) -> list[int] | None:
        if self.accounted and self.pp > 1 and self.args.pipeline_model_parallel_layout is None:
            parts = [self.split_parts // self.stage_count] * self.stage_count
            parts[0] -= bool(self.args.account_for_embedding_in_pipeline_split)
            parts[-1] -= bool(self.args.account_for_loss_in_pipeline_split)
            return parts
        if self.args.num_layers_per_virtual_pipeline_stage is not None:
            return [self.args.num_layers_per_virtual_pipeline_stage] * self.stage_count
        if not self.pipeline_ends:
            return None
        holders = (schedule_rules.rank_of_stage(stage, self.stage_count, self.pp, self.schedule)
                   for stage in range(self.stage_count))
        of_rank, stages_of_rank = self._layers_of_ranks, self.virtual_stages
        return [of_rank[rank] // stages_of_rank for rank in holders]

    @property
    def _layers_of_ranks(self) -> list[int]:
        """Return the layers of each pipeline rank: at the ends as many as was asked for, between them equal parts."""
        first, last = self.args.decoder_first_pipeline_num_layers, self.args.decoder_last_pipeline_num_layers
        given = [number for number in (first, last) if number is not None]
        each = (self.model.num_hidden_layers - sum(given)) // max(self.pp - len(given), 1)
        return [each if first is None else first, *[each] * (self.pp - 2), each if last is None else last]

    @property
    def pipeline_ends(self) -> str:
        """Return the arguments that give numbers of layers to the ends of the pipeline, as they were typed."""
        numbers = {end: getattr(self.args, f"decoder_{end}_pipeline_num_layers") for end in ("first", "last")}
        return " ".join(f"--decoder-{end}-pipeline-num-layers {number}"
                        for end, number in numbers.items() if number is not None)

    @property
    def ends_divide(self) -> bool:
        """Return whether every layer has a rank, and every rank has as many layers on each of its stages."""
        layers = self._layers_of_ranks
        return sum(layers) == self.model.num_hidden_layers and min(layers) > 0 and not any(
            number % self.virtual_stages for number in layers)

    @property
    def batch(self) -> BatchSettings:
        ramp = self.args.rampup_batch_size
        size = self.args.global_batch_size or (self.rollout_samples if self.reinforces else self._row)
        return BatchSettings(self.args.micro_batch_size, size, tuple(ramp) if ramp else None)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return timeline.batch_sizes(self.batch)

    @property
    def uneven_batch(self) -> str | None:
        """Return a global batch size, the ramp's included, that micro-batches and data ranks do not divide, or None.

        Reinforcement learning packs samples into as many rows as these divide.
        """
        sizes = () if self.reinforces else self.batch_sizes
        return next((self._named(size) for size in sizes if size % self._row), None)

    @property
    def refused_microbatches(self) -> tuple[int, str] | None:
        """Return a number of micro-batches that the schedule does not take, and its global batch size; None if none."""
        sizes = () if self.reinforces else self.batch_sizes
        return next(((size // self._row, self._named(size)) for size in sizes
                     if not schedule_rules.takes_microbatches(self.schedule, self.pp, size // self._row)), None)

    @property
    def rollout_samples(self) -> int:
        """Return the samples of a rollout of reinforcement learning."""
        return self.args.grpo_prompts_per_step * self.args.grpo_group_size

    @property
    def updates_per_rollout(self) -> int:
        return self.rollout_samples * self.args.grpo_iterations // self.batch.global_batch_size

    @property
    def _row(self) -> int:
        """Return the sequences of one micro-batch on all data ranks."""
        return self.args.micro_batch_size * self.dp

    def _named(self, batch_size: int) -> str:
        """Return a global batch size as text, with the ramp if it is a size on the way."""
        if batch_size == self.batch.global_batch_size:
            return str(batch_size)
        return f"{batch_size} (of --rampup-batch-size {' '.join(map(str, self.args.rampup_batch_size))})"

    @property
    def microbatch_rule(self) -> str:
        return schedule_rules.microbatch_rule(self.schedule, self.pp)

    @property
    def given_beside_auto_layout(self) -> str:
        """Return the options that --auto-layout decides and that were given all the same, as they are typed."""
        return given_beside(self.args)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Return the patterns of parameters that are not to be trained."""
        return tuple(self.args.freeze_parameters or ())

    @property
    def unknown_frozen(self) -> str | None:
        return matches_nothing(self.model, self.frozen) if self.frozen else None

    @property
    def lora_option_alone(self) -> str | None:
        """Return the first option of LoRA that was given without --lora-rank, or None."""
        given = (name for name in _OF_LORA if getattr(self.args, name) not in (None, False))
        return next((f"--{name.replace('_', '-')}" for name in given), None) if self.args.lora_rank is None else None

    @property
    def unknown_lora_target(self) -> str | None:
        return adapters.matches_nothing(self.model, self.args.lora_target or ())

    @property
    def balance(self) -> tuple[str, float]:
        """Return the type and coefficient of the balance loss: the arguments', else those of aux_loss_alpha."""
        coefficient = self.args.moe_aux_loss_coeff
        kind = self.args.moe_router_load_balancing_type
        if kind == "none" or not self.model.n_routed_experts:
            return "none", coefficient or 0.0
        coefficient = self.model.aux_loss_alpha if coefficient is None else coefficient
        if kind is None:
            kind = ("seq_aux_loss" if self.model.seq_aux else "aux_loss") if coefficient else "none"
        return kind, coefficient

    @property
    def evaluates(self) -> bool:
        """Return whether pre-training is asked to evaluate."""
        return bool(self.args.eval_iters) or self.args.full_validation

    @property
    def options_of_tasks(self) -> str:
        """Return the first option that says how --eval-tasks are evaluated, as it was typed; "" where there is none."""
        names = ("eval_tasks_interval", "eval_tasks_limit", "eval_tasks_num_fewshot", "eval_tasks_include_path")
        given = (name for name in names if getattr(self.args, name) is not None)
        return next((f"--{name.replace('_', '-')} {getattr(self.args, name)}" for name in given), "")

    @property
    def evaluation(self) -> str:
        """Return the argument that asks for evaluations, as it was typed."""
        return "--full-validation" if self.args.full_validation else f"--eval-iters {self.args.eval_iters}"

    @property
    def repeated_set_name(self) -> str | None:
        names = self.args.validation_set_names or ()
        return next((name for name in names if names.count(name) > 1), None)

    @property
    def validation_weight(self) -> float:
        split_data_paths = data_paths(self.args)[1]
        if split_data_paths is not None:
            return float(split_data_paths[1] is not None)
        return float(self.args.split.split(",")[1])
