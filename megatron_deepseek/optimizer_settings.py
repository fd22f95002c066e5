"""The settings of the optimizer and of its learning rate, a part of a run's (settings.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of AdamW (arXiv 1711.05101). Norm weights and other vectors have no weight decay, as in Megatron.

    `exp_avg_dtype`, `exp_avg_sq_dtype`: fp32 (the master weights' dtype) or bf16, in which moments are kept between
    steps; the update is computed in the master weights' dtype. `lora_plus_ratio`: the learning rate of LoRA's B over
    that of A (LoRA+, arXiv 2402.12354).
    """

    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    lora_plus_ratio: float = 1.0


@dataclass(frozen=True)
class LearningRateSettings:
    """The learning rate and its schedule.

    `lr_decay_style`: constant, linear, cosine, inverse-square-root, WSD or deepseek-v3 (V3 report, section 4.2).

    The rate rises linearly from lr_warmup_init to lr over lr_warmup_iters, lr_warmup_samples or lr_warmup_fraction of
    the decay's length (none of them: no rise). The decay ends after lr_decay_iters or lr_decay_samples (neither: with
    the run). WSD holds lr until the last lr_wsd_decay_iters or lr_wsd_decay_samples before that end, over which it
    falls in lr_wsd_decay_style. deepseek-v3 holds lr for lr_constant_fraction of the decay's length, falls by a cosine
    to min_lr over lr_cosine_fraction, holds min_lr, and ends at lr_final for the last lr_final_fraction.
    training/schedules.py turns all lengths into samples.
    """

    lr: float = 2.2e-4
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"
    lr_decay_iters: int | None = None
    lr_decay_samples: int | None = None
    lr_warmup_iters: int | None = None
    lr_warmup_samples: int | None = None
    lr_warmup_fraction: float | None = None
    lr_warmup_init: float = 0.0
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_samples: int | None = None
    lr_wsd_decay_style: str = "linear"
    lr_constant_fraction: float = 10.0 / 14.8
    lr_cosine_fraction: float = 4.3 / 14.8
    lr_final_fraction: float = 0.167 / 14.8
    lr_final: float = 7.3e-6
