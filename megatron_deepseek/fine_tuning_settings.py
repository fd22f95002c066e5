"""The settings of fine-tuning: what is special to it beside settings.py, which has those of every run."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PreferenceSettings:
    """What is trained for in preference tuning; the fields are named after their options, which are TRL's.

    `objective`: dpo, ipo, hinge, kto, orpo, simpo or reward. `beta`: the strength of the reference, in ORPO the weight
    of the odds ratio, in SimPO the scale of the reward. `label_smoothing`: the part of pairs whose labels are taken to
    be wrong (dpo, simpo). `rpo_alpha`: the factor of the chosen answers' negative log-likelihood. `simpo_gamma`: the
    margin that is asked for. `desirable_weight`, `undesirable_weight`: of KTO's good and bad answers.
    `center_rewards_coefficient`: of a reward model's term that holds its scores around 0.
    """

    objective: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    center_rewards_coefficient: float = 0.0

    @property
    def has_reference(self) -> bool:
        """Return whether the loss compares with a reference model."""
        return self.objective in ("dpo", "ipo", "hinge", "kto")

    @property
    def likelihood_factor(self) -> float:
        """Return the factor of the chosen answers' negative log-likelihood, a mean over tokens."""
        return 1.0 if self.objective == "orpo" else self.rpo_alpha


@dataclass(frozen=True)
class DistillationSettings:
    """What is learnt from a teacher; the fields are named after their options.

    `teacher`: the directory of a model's weights, or of a cache of its logits. `kd_loss`: forward-kl, reverse-kl or
    jsd, whose weight of the teacher is `kd_jsd_beta`. `kd_temperature`: logits of both are divided by it.
    `kd_ratio`: the weight of that loss; that of the labels' negative log-likelihood is the rest to 1.
    `kd_temperature_squared`: the loss counts with the factor temperature^2. `teacher_expert_model_parallel_size`: ranks
    that share the teacher's experts.
    """

    teacher: Path
    kd_loss: str = "forward-kl"
    kd_temperature: float = 1.0
    kd_jsd_beta: float = 0.5
    kd_ratio: float = 1.0
    kd_temperature_squared: bool = False
    teacher_expert_model_parallel_size: int = 1

    @property
    def factor(self) -> float:
        """Return the factor of the divergence in the loss."""
        return self.kd_ratio * (self.kd_temperature**2 if self.kd_temperature_squared else 1.0)


@dataclass(frozen=True)
class LogitCacheSettings:
    """What tools/cache_logits.py keeps of a teacher's predictions, and where.

    `output`: the directory. `top_k`: how many ids of each label token have their log-probabilities there, which are
    those at `kd_temperature`, as `cache_dtype` (fp16 or fp32). `student_vocab_size`: the first ids, of which alone the
    probabilities are, None for all.
    """

    output: Path
    top_k: int = 64
    kd_temperature: float = 1.0
    cache_dtype: str = "fp16"
    student_vocab_size: int | None = None


@dataclass(frozen=True)
class FineTuningSettings:
    """What is special to fine-tuning; the fields are named after their options, `freeze` is in RunSettings.

    `dataset` are files, or weights and files in turn; each of `eval_dataset` is a set of its own. `max_length`: the
    most tokens of a conversation, None for the row's. `loss_average`: token or sample. `neftune_alpha`: 0 for no noise.
    `generate_every`: iterations between answers to `generate_prompts` held-out prompts, of `generate_tokens` at most;
    None for none. `preference`: what is trained for beside likelihood, None for supervised fine-tuning.
    `distillation`: what is learnt from a teacher, None without one. `logit_cache`: what is kept of its predictions,
    None where nothing is.
    """

    dataset: tuple[str, ...]
    eval_dataset: tuple[str, ...] = ()
    template: str = "auto"
    max_length: int | None = None
    overlong: str = "drop"
    packing: bool = True
    loss_average: str = "token"
    train_think_prefix: bool = False
    history_reasoning: str = "as-release"
    split_turns: str = "none"
    neftune_alpha: float = 0.0
    max_bad_rows: int = 0
    num_workers: int = 2
    recipe: str = "deepseek-v3"
    generate_every: int | None = None
    generate_prompts: int = 8
    generate_tokens: int = 128
    dry_run: bool = False
    preference: PreferenceSettings | None = None
    distillation: DistillationSettings | None = None
    logit_cache: LogitCacheSettings | None = None
