"""The settings of a run: frozen dataclasses, one per concern, which arguments/settings.py fills. Those of the optimizer
are in optimizer_settings.py.

Field names are Megatron-LM's argument names wherever Megatron has one. Sizes are in samples (sequences) unless the
name says tokens or iterations; a length keeps the unit that it was given in.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_deepseek.fine_tuning_settings import FineTuningSettings
from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.base_weights import BaseSettings
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.optimizer_settings import LearningRateSettings, OptimizerSettings
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.rl_settings import PolicyLossSettings, ReinforcementSettings, RolloutSettings


@dataclass(frozen=True)
class BatchSettings:
    """Batch sizes. `rampup_batch_size`: (start, increment, samples over which to reach global_batch_size), or None."""

    micro_batch_size: int
    global_batch_size: int
    rampup_batch_size: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class LossSettings:
    """The weights of the losses beside cross-entropy. `balance_type`: none, seq_aux_loss or aux_loss (per micro-batch).

    `moe_router_force_load_balancing` chooses experts by position, for benchmarks. `moe_expert_capacity_factor`: an
    expert takes at most so many times its even share of a sequence's tokens, None for no limit; `moe_token_drop_policy`
    is probs or position. `loss_chunk_size`: tokens whose logits exist at once, None for the default of model/head.py.
    """

    mtp_loss_scaling_factor: float = 0.3
    balance_type: str = "none"
    moe_aux_loss_coeff: float = 0.0
    moe_device_aux_loss_coeff: float = 0.0
    moe_communication_aux_loss_coeff: float = 0.0
    moe_router_bias_update_rate: float = 0.0
    moe_router_bias_update_until: int | None = None
    moe_router_bias_update_samples: int | None = None
    moe_router_force_load_balancing: bool = False
    moe_expert_capacity_factor: float | None = None
    moe_token_drop_policy: str = "probs"
    loss_chunk_size: int | None = None


@dataclass(frozen=True)
class RecomputeSettings:
    """What is recomputed. `granularity`: None, full (whole layers) or selective (`modules` of layernorm, mla_up_proj,
    moe_act).
    """

    granularity: str | None = None
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class OffloadSettings:
    """What is kept in the host's memory: the activations of the first `cpu_offloading_num_layers` layers of each stage,
    and with `optimizer_cpu_offload` master weights, gradients and moments, which are then updated there.
    """

    cpu_offloading_num_layers: int = 0
    optimizer_cpu_offload: bool = False


@dataclass(frozen=True)
class CommunicationSettings:
    """How tensors travel between ranks.

    `cp_comm_type`: ring or allgather, between the ranks that share a sequence. `moe_token_dispatcher_type`: allgather,
    alltoall or grouped, between expert ranks. `moe_ranks_per_node`: the size of a node for grouped (None: all ranks of
    the job are on one node). `moe_shared_expert_overlap`: on CUDA the shared experts compute while tokens travel.
    `overlap_moe_expert_parallel_comm`: the other half of DualPipeV's pairs computes while tokens travel.
    """

    cp_comm_type: str = "ring"
    moe_token_dispatcher_type: str = "alltoall"
    moe_ranks_per_node: int | None = None
    moe_shared_expert_overlap: bool = False
    overlap_moe_expert_parallel_comm: bool = False


@dataclass(frozen=True)
class PipelineSettings:
    """The pipeline. `schedule`: a name of torch.distributed.pipelining.

    `layout`: Megatron's string, None to balance by cost.
    """

    schedule: str = "1F1B"
    layout: str | None = None
    num_virtual_stages: int = 1


@dataclass(frozen=True)
class DataSettings:
    """The data. `data_path`: prefixes, or weights and prefixes in turn. `split`: weights of train, valid and test.

    `split_data_paths` instead gives each of train, valid and test a path of its own, or None. `data_arguments`: how
    messages name the files that gave train, valid and test; empty if --data-path, --train-data-path and the like did.
    With `mock_data` the path is empty until data/mock.py has made the files.
    `full_validation`: an evaluation reads every sample of the validation data once, in place of some batches.
    `multiple_validation_sets`: each dataset of it is evaluated by itself; `validation_set_names` are the sets' names,
    empty for those of their files. `num_workers`: threads that read batches ahead, 0 for none.
    """

    data_path: tuple[str, ...]
    seq_length: int
    split_data_paths: tuple[tuple[str, ...] | None, ...] | None = None
    split: str = "969,30,1"
    data_cache_path: str | None = None
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_model: str | None = None
    eod_mask_loss: bool = False
    reset_attention_mask: bool = False
    seed: int = 1234
    data_arguments: tuple[str, ...] = ()
    mock_data: bool = False
    full_validation: bool = False
    multiple_validation_sets: bool = False
    validation_set_names: tuple[str, ...] = ()
    num_workers: int = 1


@dataclass(frozen=True)
class RunSettings:
    """The loop: how long it runs, how often it evaluates, saves and reports, and in which dtypes it computes.

    `train_iters`: the iteration at which it ends. With `train_samples` it is computed for a run from its start, and
    again from a checkpoint that is resumed. With `epochs` the data gives `train_samples`, both unknown before (0 and
    None), and the last batch is made even if it is not full.
    `fp8_format`: None, or e4m3 by the blockwise recipe (ops/fp8/recipe.py). `fp8_param_gather`: its weights are
    quantised before FSDP gathers them (ops/fp8/weight.py). `compile`: functions of the layers become graphs of
    torch.compile (model/compiled.py). `model_file`: the config.json of --model, None for a preset.
    `save_hf_dtype`: bf16, fp32 or fp8, None for that of the computation; `fp8_scale_format`: of FP8 weights of the
    export, None for that of what the run began from (checkpoint/convert/block_fp8.py).
    `eval_tasks`: tasks of lm-eval that are evaluated every `eval_tasks_interval` iterations, as the options say.
    `freeze_parameters`: wildcard patterns over the names of parameters that are not trained. `drop_mtp`: the command
    line says --mtp-num-layers 0, so modules of weights that are taken over stay behind. `unpadded_vocab_size`: the
    rows of the embedding that exports have, None for all.
    """

    train_iters: int
    train_samples: int | None = None
    epochs: int | None = None
    save: Path | None = None
    load: Path | None = None
    save_interval: int | None = None
    save_every_seconds: float | None = None
    async_save: bool = False
    keep_last: int | None = None
    no_save_optim: bool = False
    save_hf: Path | None = None
    save_hf_dtype: str | None = None
    fp8_scale_format: str | None = None
    model_file: Path | None = None
    chat_template: str | None = None
    eval_interval: int | None = None
    eval_iters: int = 0
    eval_tasks: tuple[str, ...] = ()
    eval_tasks_interval: int = 1000
    eval_tasks_limit: float | None = None
    eval_tasks_num_fewshot: int | None = None
    eval_tasks_include_path: Path | None = None
    log_interval: int = 1
    exit_interval: int | None = None
    exit_duration_in_mins: float | None = None
    ckpt_step: int | None = None
    finetune: bool = False
    no_load_optim: bool = False
    init_mtp: bool = False
    drop_mtp: bool = False
    overwrite: bool = False
    nan_policy: str = "stop"
    max_skipped_steps: int = 10
    log_throughput: bool = False
    log_num_zeros_in_grad: bool = False
    log_params_norm: bool = False
    log_timers_to_tensorboard: bool = False
    log_memory_to_tensorboard: bool = False
    log_validation_ppl_to_tensorboard: bool = False
    log_world_size_to_tensorboard: bool = False
    tensorboard_dir: Path | None = None
    tensorboard_log_interval: int = 1
    tensorboard_queue_size: int = 1
    metrics_file: Path | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    wandb_entity: str | None = None
    wandb_save_dir: Path | None = None
    check_weight_hash_across_dp_replicas_interval: int | None = None
    manual_gc: bool = False
    manual_gc_interval: int = 0
    manual_gc_eval: bool = True
    profile: bool = False
    profile_step_start: int = 10
    profile_step_end: int = 12
    distributed_timeout_minutes: float = 10.0
    seed: int = 1234
    bf16: bool = False
    fp8_format: str | None = None
    fp8_param_gather: bool = False
    compile: bool = False
    load_adapter: Path | None = None
    save_adapter: Path | None = None
    adapter_for: str | None = None
    sharding: str = "optim_grads"
    freeze_parameters: tuple[str, ...] = ()
    unpadded_vocab_size: int | None = None


@dataclass(frozen=True)
class Settings:
    """All settings of a run. `fine_tuning` is None but in fine-tuning, `lora` where the weights themselves are trained,
    `base` where those beside adapters are plain numbers; `reinforcement`, `rollout` and `policy_loss` are None but in
    reinforcement learning. `notes`: lines for its start, on consequences that may not be expected.
    """

    model: ModelConfig
    layout: Layout
    pipeline: PipelineSettings
    optimizer: OptimizerSettings
    learning_rate: LearningRateSettings
    batch: BatchSettings
    loss: LossSettings
    recompute: RecomputeSettings
    communication: CommunicationSettings
    offload: OffloadSettings
    data: DataSettings
    run: RunSettings
    fine_tuning: FineTuningSettings | None = None
    reinforcement: ReinforcementSettings | None = None
    rollout: RolloutSettings | None = None
    policy_loss: PolicyLossSettings | None = None
    lora: LoraSettings | None = None
    base: BaseSettings | None = None
    notes: tuple[str, ...] = ()
