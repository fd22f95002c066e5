"""The command line of reinforcement learning: pre-training's arguments, with prompts, rewards and a loss for data.

Where Megatron-LM or TRL have an option, it has the same name here; docs/grpo.md has a table of them.
"""

import argparse
import re

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.dry_run import KINDS, OPTIONS, add_dry_run
from megatron_deepseek.arguments.parser import (
    AFTER_DATA,
    BEFORE_LENGTH,
    BETWEEN_LENGTH_AND_DATA,
    TOKENIZER_TYPES,
    add_batch,
    add_lengths,
)
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.rl_settings import PolicyLossSettings, ReinforcementSettings, RolloutSettings

PROGRAM = "train_grpo.py"
TEXT = "none"  # of --template: the prompt as it is, behind the token that begins a text
TEMPLATES = ("auto", TEXT, "deepseek-v2", "deepseek-v3", "deepseek-r1", "deepseek-v3.1")
ADVANTAGES = ("sample-std", "population-std", "none")
AGGREGATIONS = ("sample-mean", "token-mean", "constant")
CONSTANT = AGGREGATIONS[2]
NO_KL, *_ = KLS = ("none", "k3", "unbiased")
RATIOS = ("token", "sequence", "cispo")
NO_OVERLONG, _, PENALTY = OVERLONG = ("none", "mask", "penalty")
NO_CORRECTION, *_ = CORRECTIONS = ("none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask")
# Defaults that are not pre-training's: DeepSeekMath's learning rate (arXiv 2402.03300, section 4.2), which stays as it
# is, and no weight decay, as in TRL.
_DEFAULTS = dict(lr=1e-6, min_lr=0.0, lr_decay_style="constant", weight_decay=0.0)
_SHOWN = dict(lr="1e-6", min_lr="0", lr_decay_style="constant", weight_decay="0",
              global_batch_size="all samples of a rollout", moe_router_bias_update_rate="0, the bias stays as it is")
# Pre-training's arguments for data, which the validation rules and settings ask for, have these values here.
_NO_PRETRAINING_DATA = dict(data_path=None, data_args_path=None, train_data_path=None, valid_data_path=None,
                            test_data_path=None, mock_data=False, per_split_data_args_path=None, split="1,0,0",
                            data_cache_path=None, reset_attention_mask=True, reset_position_ids=False,
                            eod_mask_loss=False)
_LOSS, _ROLLOUT, _REINFORCEMENT = PolicyLossSettings(), RolloutSettings(), ReinforcementSettings(())


class GrpoHelp(argparse.MetavarTypeHelpFormatter):
    """Help in which options have the defaults of reinforcement learning."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest not in _SHOWN:
            return action.help
        return re.sub(r"\s*\([^()]*\)$", "", action.help) + f" ({_SHOWN[action.dest]})"


class GrpoParser(OneLineParser):
    """A parser that says what there is instead of a dry run, which would have to make rollouts."""

    def describe_unknown(self, name: str) -> str:
        if name in OPTIONS:
            return f"{name} is for {' and '.join(KINDS)} of the other entries"
        if name not in KINDS:
            return super().describe_unknown(name)
        return (f"{name} is no option of {PROGRAM}: a dry run makes no rollouts. finetune_deepseek.py {name} makes an "
                "update's step of the same model and layout, and tools/plan.py memory --task grpo adds the engine and "
                "the reference")


def build_grpo_parser() -> argparse.ArgumentParser:
    parser = GrpoParser(prog=PROGRAM, formatter_class=GrpoHelp, allow_abbrev=False,
                        usage=f"torchrun ... {PROGRAM} --model NAME --load DIR --prompts FILE --reward NAME ...",
                        description="Train a DeepSeek model by rewards for its answers (GRPO). Defaults are given in "
                        "parentheses.",
                        epilog="examples/ has scripts that start it for each model, on one node and on many.")
    for add in (*BEFORE_LENGTH, _add_length_and_batch, _add_prompts, _add_rollouts, _add_rewards, _add_loss,
                *BETWEEN_LENGTH_AND_DATA, *(each for each in AFTER_DATA if each is not add_dry_run)):
        add(parser)
    parser.set_defaults(**_NO_PRETRAINING_DATA, **_DEFAULTS)
    return parser


def _add_length_and_batch(parser):
    group = parser.add_argument_group("length and batch", "an iteration is an update")
    add_lengths(group.add_mutually_exclusive_group(required=True))
    add_batch(group)


def _add_prompts(parser):
    add = parser.add_argument_group("prompts", "docs/grpo.md").add_argument
    add("--prompts", type=str, nargs="+", metavar="FILE", required=True,
        help="JSONL, JSON or parquet files, globs or directories of rows with a prompt")
    add("--eval-prompts", type=str, nargs="+", metavar="FILE",
        help="held-out prompts, whose likeliest answers are rewarded every --eval-interval iterations (none)")
    add("--prompt-column", type=str, metavar="NAME", help="where a row has it, a text or messages (prompt or messages)")
    add("--answer-column", type=str, metavar="NAME", help="what rewards find as a row's answer (answer)")
    add("--template", type=str, choices=TEMPLATES, default=_REINFORCEMENT.template,
        help=f"how it is written; {TEXT}: the text as it is (auto: what the tokenizer's tokens say)")
    add("--thinking", action=argparse.BooleanOptionalAction,
        help="answers begin with thoughts (as the template's release does)")
    add("--max-prompt-length", type=values.positive_int, metavar="TOKENS",
        help="longer prompts are left out (what --max-completion-length leaves of a row)")
    add("--max-bad-rows", type=values.count, default=_REINFORCEMENT.max_bad_rows, metavar="N",
        help="other rows that may be skipped (0)")
    add("--tokenizer-type", type=str, choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0],
        help=f"({TOKENIZER_TYPES[0]})")
    add("--tokenizer-model", type=str, metavar="PATH",
        help="tokenizer.json or a directory with one (the one that is with --load)")


def _add_rollouts(parser):
    group = parser.add_argument_group("rollouts", "answers by the model that is trained, on the same ranks")
    add = group.add_argument
    add("--grpo-prompts-per-step", type=values.positive_int, default=_ROLLOUT.prompts, metavar="N",
        help=f"prompts of a rollout ({_ROLLOUT.prompts})")
    add("--grpo-group-size", "--num-generations", type=values.positive_int, default=_ROLLOUT.group_size, metavar="N",
        help=f"answers to each ({_ROLLOUT.group_size})")
    add("--grpo-iterations", "--num-iterations", type=values.positive_int, default=_ROLLOUT.iterations, metavar="N",
        help=f"how often each is trained on ({_ROLLOUT.iterations})")
    add("--max-completion-length", type=values.positive_int, default=_ROLLOUT.max_tokens, metavar="TOKENS",
        help=f"of an answer at most ({_ROLLOUT.max_tokens})")
    add("--temperature", type=values.positive, default=_LOSS.temperature, help="of rollouts and of training (1)")
    add("--top-p", type=values.fraction, default=_ROLLOUT.top_p, help="draw from so much probability (1)")
    add("--top-k", type=values.count, default=_ROLLOUT.top_k, help="draw from so many tokens (0: all)")
    add("--min-p", type=values.fraction, default=_ROLLOUT.min_p,
        help="draw from tokens with so much of the likeliest one's probability (0)")
    add("--stop", type=str, nargs="+", default=[], metavar="TEXT", help="texts that end an answer (none)")
    add("--keep-routing", action="store_true", help="train with the experts that the rollout chose")
    add("--keep-sampling-mask", action="store_true", help="train among the tokens that --top-p, --top-k, --min-p left")
    add("--dynamic-sampling", "--grpo-filter-groups-with-same-reward", action="store_true",
        help="draw other prompts in place of those whose answers all have the same reward")
    add("--max-sampling-rounds", type=values.positive_int, metavar="N",
        help=f"of --dynamic-sampling ({_REINFORCEMENT.max_sampling_rounds})")
    add("--rollout-tensor-parallel-size", type=values.positive_int, metavar="N", help="of rollouts (training's)")
    add("--rollout-expert-parallel-size", type=values.positive_int, metavar="N", help="of rollouts (training's)")


def _add_rewards(parser):
    add = parser.add_argument_group("rewards", "docs/rewards.md").add_argument
    add("--reward", type=str, action="append", required=True, metavar="SPEC[:WEIGHT]",
        help="FILE.py:NAME of a function, or the name of a ready one; given again, they are added up")
    add("--reward-timeout", type=values.positive, default=_REINFORCEMENT.reward_timeout, metavar="SECONDS",
        help=f"of a call ({_REINFORCEMENT.reward_timeout:g})")
    add("--reward-workers", type=values.positive_int, default=_REINFORCEMENT.reward_workers, metavar="N",
        help=f"processes that call them ({_REINFORCEMENT.reward_workers})")


def _add_loss(parser):
    add = parser.add_argument_group("policy loss", "docs/grpo.md has the formulas").add_argument
    add("--advantage", type=str, choices=ADVANTAGES, default=_LOSS.advantage,
        help=f"what a reward less its group's mean is divided by ({_LOSS.advantage})")
    add("--advantage-epsilon", type=values.non_negative, default=_LOSS.advantage_epsilon, metavar="X",
        help=f"added to that ({_LOSS.advantage_epsilon:g})")
    add("--loss-aggregation", type=str, choices=AGGREGATIONS, default=_LOSS.loss_aggregation,
        help=f"of tokens to a loss ({_LOSS.loss_aggregation})")
    add("--loss-constant", type=values.positive_int, metavar="TOKENS",
        help=f"of {CONSTANT}: what the sum of a sample is divided by (--max-completion-length)")
    add("--ratio", type=str, choices=RATIOS, default=_LOSS.ratio, help=f"sequence: GSPO ({_LOSS.ratio})")
    add("--clip-low", "--grpo-clamp-eps-lower", type=values.fraction, default=_LOSS.clip_low, metavar="X",
        help=f"the ratio's bound below is 1 - X ({_LOSS.clip_low})")
    add("--clip-high", "--grpo-clamp-eps-upper", type=values.non_negative, default=_LOSS.clip_high, metavar="X",
        help=f"the one above 1 + X ({_LOSS.clip_high})")
    add("--dual-clip", type=values.positive, metavar="X", help="the greatest ratio of a negative advantage (none)")
    add("--kl", type=str, choices=KLS, default=_LOSS.kl, help=f"how far from the reference is measured ({_LOSS.kl})")
    add("--kl-beta", "--grpo-kl-beta", type=values.non_negative, metavar="BETA",
        help=f"its factor ({_LOSS.kl_beta} with --kl)")
    add("--reference-refresh-interval", type=values.positive_int, metavar="N",
        help="updates after which the reference becomes the model of the moment (never)")
    add("--overlong", type=str, choices=OVERLONG, default=_LOSS.overlong,
        help="what becomes of unfinished answers: no loss, or a lower reward (none)")
    add("--overlong-buffer", type=values.positive_int, metavar="TOKENS",
        help=f"of {PENALTY}: before the longest answer, over which it rises to 1 (a fifth of --max-completion-length)")
    add("--off-policy-mask-delta", type=values.non_negative, metavar="X",
        help="leave out samples of negative advantage that became less likely by more (never)")
    add("--rollout-correction", type=str, choices=CORRECTIONS, default=_LOSS.rollout_correction,
        help="weights by how likely training finds what the rollout drew (none)")
    add("--rollout-correction-threshold", type=values.positive, metavar="X",
        help=f"of them ({_LOSS.rollout_correction_threshold:g})")


def grpo_settings(args) -> dict[str, PolicyLossSettings | RolloutSettings | ReinforcementSettings]:
    """Return what parsed arguments ask for, by the names of the fields of Settings."""
    rollout = RolloutSettings(
        prompts=args.grpo_prompts_per_step, group_size=args.grpo_group_size, iterations=args.grpo_iterations,
        max_tokens=args.max_completion_length, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p,
        stop=tuple(args.stop), keep_routing=args.keep_routing, keep_sampling_mask=args.keep_sampling_mask,
        tp=args.rollout_tensor_parallel_size, ep=args.rollout_expert_parallel_size)
    constant = args.max_completion_length if args.loss_constant is None else args.loss_constant
    loss = _fill(PolicyLossSettings, args, loss_constant=constant if args.loss_aggregation == CONSTANT else None)
    buffer = max(1, args.max_completion_length // 5) if args.overlong_buffer is None else args.overlong_buffer
    reinforcement = _fill(ReinforcementSettings, args, prompts=tuple(args.prompts), reward=tuple(args.reward),
                          eval_prompts=tuple(args.eval_prompts or ()),
                          overlong_buffer=buffer if args.overlong == PENALTY else None)
    return {"policy_loss": loss, "rollout": rollout, "reinforcement": reinforcement}


def _fill(kind: type, args, **given):
    """Make settings of class `kind` from the arguments of the same names; those that are None have its defaults."""
    names = [name for name in kind.__dataclass_fields__ if name not in given and getattr(args, name) is not None]
    return kind(**{name: getattr(args, name) for name in names}, **given)
