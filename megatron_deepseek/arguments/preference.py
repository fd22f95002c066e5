"""The arguments of preference tuning, and their validation rules: a part of the table in validation.py.

Names and defaults are TRL's.
"""

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import Rule
from megatron_deepseek.fine_tuning_settings import PreferenceSettings
from megatron_deepseek.model.architecture.freezing import trains_mtp_only

SFT, REWARD = "sft", "reward"
OBJECTIVES = (SFT, "dpo", "ipo", "hinge", "kto", "orpo", "simpo", REWARD)
_SIMPO_BETA = 2.0
_SMOOTHED, _WITH_LIKELIHOOD = ("dpo", "simpo"), ("dpo", "ipo", "hinge", "simpo")
_WITH_BETA = ("dpo", "ipo", "hinge", "kto", "orpo", "simpo")
# Which objectives read an option; each option's name is that of its field in PreferenceSettings.
_READ_BY = {"beta": _WITH_BETA, "label_smoothing": _SMOOTHED, "rpo_alpha": _WITH_LIKELIHOOD, "simpo_gamma": ("simpo",),
            "desirable_weight": ("kto",), "undesirable_weight": ("kto",), "center_rewards_coefficient": (REWARD,)}


def add_preference(parser):
    add = parser.add_argument_group("objective", "what is trained for; docs/preference.md").add_argument
    add("--objective", type=str, choices=OBJECTIVES, default=SFT,
        help="sft: the likelihood of answers; reward: a model that scores them; the others: preferences (sft)")
    add("--beta", type=values.positive, help="strength of the reference; orpo: weight of the odds ratio; simpo: scale "
        f"of the reward (0.1; simpo: {_SIMPO_BETA:g})")
    add("--label-smoothing", type=values.fraction, metavar="P",
        help="dpo, simpo: the part of pairs that may be labelled the wrong way round (0)")
    add("--rpo-alpha", type=values.non_negative, metavar="ALPHA",
        help="add ALPHA times the negative log-likelihood of the chosen answers' tokens (0)")
    add("--simpo-gamma", type=values.non_negative, metavar="GAMMA", help="margin that simpo asks for (0.5)")
    add("--desirable-weight", type=values.non_negative, metavar="W", help="of kto's good answers (1)")
    add("--undesirable-weight", type=values.non_negative, metavar="W", help="of kto's bad answers (1)")
    add("--center-rewards-coefficient", type=values.non_negative, metavar="C",
        help="reward: add C times the mean of (score of chosen + score of rejected)^2 (0)")


def is_reward(args) -> bool:
    """Return whether parsed arguments, of any entry, ask for a reward model."""
    return getattr(args, "objective", SFT) == REWARD


def preference_settings(args) -> PreferenceSettings | None:
    """Return what parsed arguments ask for, None for supervised fine-tuning."""
    if args.objective == SFT:
        return None
    given = {name: getattr(args, name) for name in _READ_BY if getattr(args, name) is not None}
    if args.objective == "simpo":
        given.setdefault("beta", _SIMPO_BETA)
    return PreferenceSettings(args.objective, **given)


def _prefers(r: Request) -> bool:
    return r.fine_tunes and r.args.objective != SFT


def _read_by(name: str, readers: tuple[str, ...]) -> Rule:
    """Return the rule against an option that the objective does not read."""
    option = f"--{name.replace('_', '-')}"
    return Rule(f"{option} is for other objectives", lambda r: r.fine_tunes and getattr(r.args, name) is not None
                and r.args.objective not in readers,
                f"{option} {{r.args.{name}}} is for --objective {' or '.join(readers)}, not {{r.args.objective}}")


PREFERENCE = (
    *(_read_by(*each) for each in _READ_BY.items()),
    Rule("half of all labels are wrong", lambda r: r.fine_tunes and (r.args.label_smoothing or 0) >= 0.5,
         "--label-smoothing {r.args.label_smoothing} must be less than 0.5: beyond that the rejected answers are "
         "preferred"),
    Rule("a pair does not fit into a row",
         lambda r: _prefers(r) and r.args.seq_length < 2 * ((r.args.max_length or 1) - 1) <= 2 * r.args.seq_length,
         "--max-length {r.args.max_length} does not fit twice into rows of --seq-length {r.args.seq_length}: both "
         "sides of a pair share a row"),
    Rule("preferences are means over pairs", lambda r: _prefers(r) and r.args.loss_average != "token",
         "--loss-average {r.args.loss_average} is for --objective sft; --objective {r.args.objective} has a mean over "
         "pairs or answers"),
    Rule("a reward model has a whole head to train", lambda r: is_reward(r.args) and r.args.lora_rank is not None,
         "--lora-rank {r.args.lora_rank} conflicts with --objective reward: the new score head would stay random "
         "beside frozen weights"),
    Rule("a reward model writes no answers", lambda r: is_reward(r.args) and r.args.generate_every is not None,
         "--generate-every {r.args.generate_every} conflicts with --objective reward, whose model gives scores"),
    Rule("a reward model answers no tasks", lambda r: is_reward(r.args) and bool(r.args.eval_tasks),
         "--eval-tasks {r.args.eval_tasks} conflicts with --objective reward, whose model gives scores"),
    Rule("a reward model has no MTP modules",
         lambda r: is_reward(r.args) and (r.args.init_mtp or bool(r.args.num_nextn_predict_layers)),
         "--init-mtp and --mtp-num-layers conflict with --objective reward: a reward model predicts no tokens"),
    Rule("a reward model predicts no tokens", lambda r: r.model.reward_head and not is_reward(r.args),
         "--model is a reward model, with a score in place of an output head: only --objective reward trains it"),
    Rule("preferences train no MTP modules, the only ones that are not frozen",
         lambda r: _prefers(r) and bool(r.frozen) and trains_mtp_only(r.model, r.frozen),
         "--freeze-parameters {r.args.freeze_parameters} leaves no parameter to train: --objective {r.args.objective} "
         "leaves MTP modules as they are"),
    Rule("preferences are of whole answers", lambda r: _prefers(r) and r.args.split_turns != "none",
         "--split-turns {r.args.split_turns} is for --objective sft"),
)
