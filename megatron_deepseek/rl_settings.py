"""The settings of reinforcement learning with group-relative advantages (GRPO), beside those of settings.py.

Fields are named after their options.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PolicyLossSettings:
    """How samples with rewards become a loss; the fields are named after their options. docs/grpo.md has the formulas.

    `advantage`: what a reward less its group's mean is divided by: sample-std, population-std, or none.
    `advantage_epsilon`: added to that. `loss_aggregation`: sample-mean, token-mean, or constant, which divides each
    sample's sum by `loss_constant`. `clip_low`, `clip_high`: the ratio's bounds are 1 - low and 1 + high. `dual_clip`:
    the greatest ratio of a negative advantage, None for none. `kl`: none, k3 or unbiased, times `kl_beta`. `ratio`:
    token, sequence (GSPO) or cispo. `off_policy_mask_delta`: a sample of negative advantage is left out if the mean of
    log(p_old / p) is above it, None for never. `overlong`: none, mask (an unfinished sample has no loss) or penalty.
    `rollout_correction`: none, or token or sequence with truncate or mask, of p_training / p_rollout at
    `rollout_correction_threshold`. `temperature`: by which logits are divided, in the rollout and in training alike.
    """

    advantage: str = "sample-std"
    advantage_epsilon: float = 1e-4
    loss_aggregation: str = "sample-mean"
    loss_constant: int | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl: str = "none"
    kl_beta: float = 0.04
    ratio: str = "token"
    off_policy_mask_delta: float | None = None
    overlong: str = "none"
    rollout_correction: str = "none"
    rollout_correction_threshold: float = 2.0
    temperature: float = 1.0


@dataclass(frozen=True)
class RolloutSettings:
    """How samples are made. `prompts`: of a rollout. `group_size`: samples of a prompt. `iterations`: how often each
    sample is trained on.

    `max_tokens`: of a completion. `keep_routing`: training sends tokens to the experts that the rollout chose.
    `keep_sampling_mask`: training's probabilities are among the tokens that top_k, top_p and min_p left. `tp`, `ep`: of
    the engine, None for those of training, where these fit.
    """

    prompts: int = 32
    group_size: int = 8
    iterations: int = 1
    max_tokens: int = 512
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    keep_routing: bool = False
    keep_sampling_mask: bool = False
    tp: int | None = None
    ep: int | None = None


@dataclass(frozen=True)
class ReinforcementSettings:
    """What is asked, and how the answers are judged.

    `prompts`: files of them; `prompt_column` holds a text or messages, `answer_column` what rewards find as "answer",
    None for the names that are usual. `template`: how they are written, "none" for the text as it is; `thinking`:
    whether the template's answers begin with thoughts, None for what its release does. `max_prompt_length`: in tokens,
    longer ones are left out, None for what a row has room for; `max_bad_rows`: how many others may be.

    `reward`: functions, "FILE.py:name" or the name of a ready one, with ":weight" if it is not 1. `reward_timeout`:
    seconds of a call; `reward_workers`: processes. `reference_refresh_interval`: updates after which the reference
    becomes the model of the moment, None for never. `dynamic_sampling`: prompts whose answers all have one reward are
    replaced by others, in `max_sampling_rounds` rounds at most. `overlong_buffer`: over so many tokens before the
    longest completion the penalty of --overlong penalty rises from 0 to 1. `eval_prompts`: files of held-out prompts.
    """

    prompts: tuple[str, ...]
    reward: tuple[str, ...] = ()
    prompt_column: str | None = None
    answer_column: str | None = None
    template: str = "auto"
    thinking: bool | None = None
    max_prompt_length: int | None = None
    max_bad_rows: int = 0
    reward_timeout: float = 60.0
    reward_workers: int = 4
    reference_refresh_interval: int | None = None
    dynamic_sampling: bool = False
    max_sampling_rounds: int = 4
    overlong_buffer: int | None = None
    eval_prompts: tuple[str, ...] = ()
