"""The arguments of distillation and of tools/cache_logits.py, and their validation rules: a part of the table in
validation.py.
"""

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.preference import SFT
from megatron_deepseek.arguments.request import Request
from megatron_deepseek.arguments.rule import Rule
from megatron_deepseek.fine_tuning_settings import DistillationSettings, LogitCacheSettings

KD_LOSSES = ("forward-kl", "reverse-kl", "jsd")
CACHE_DTYPES = ("fp16", "fp32")
_TEMPERATURE = "--kd-temperature"
# Each option's name is that of its field in DistillationSettings.
_OF_TEACHER = ("kd_loss", "kd_temperature", "kd_jsd_beta", "kd_ratio", "kd_temperature_squared",
               "teacher_expert_model_parallel_size")


def add_distillation(parser):
    add = parser.add_argument_group("distillation", "from a teacher, mixed with the labels; "
                                    "docs/distillation.md").add_argument
    add("--teacher", type=values.path, metavar="DIR",
        help="checkpoints or a Hugging Face directory of another model with the same tokenizer, or a cache that "
        "tools/cache_logits.py has made of one")
    add("--kd-loss", type=str, choices=KD_LOSSES, help="the divergence from the teacher (forward-kl)")
    add(_TEMPERATURE, type=values.positive, metavar="T", help="by which the logits of both are divided (1)")
    add("--kd-jsd-beta", type=values.fraction, metavar="BETA", help="jsd: the teacher's weight in the mixture (0.5)")
    add("--kd-ratio", type=values.fraction, metavar="R",
        help="the loss is R times the divergence and 1 - R times the labels' negative log-likelihood (1)")
    add("--kd-temperature-squared", action="store_true", default=None,
        help="the divergence counts T^2 times, so that its gradient keeps its size")
    add("--teacher-expert-model-parallel-size", type=values.positive_int, metavar="N",
        help="ranks that share the teacher's experts (1)")


def add_logit_cache(parser):
    add = parser.add_argument_group("cache", "of what --load, the teacher, predicts of --dataset").add_argument
    add("--output", type=values.path, metavar="DIR", required=True, help="what is there already is not computed again")
    add("--top-k", type=values.positive_int, default=64, metavar="K", help="ids of each label token (64)")
    add("--cache-dtype", type=str, choices=CACHE_DTYPES, default="fp16", help="of log-probabilities (fp16)")
    add("--student-vocab-size", type=values.positive_int, metavar="N",
        help="probabilities of the first N ids alone, for a student whose embedding has fewer rows of padding (all)")


def distillation_settings(args) -> DistillationSettings | None:
    """Return what parsed arguments ask for, None without a teacher."""
    if args.teacher is None:
        return None
    given = {name: getattr(args, name) for name in _OF_TEACHER if getattr(args, name) is not None}
    return DistillationSettings(args.teacher, **given)


def logit_cache_settings(args) -> LogitCacheSettings | None:
    """Return what tools/cache_logits.py was asked for, None for other entries."""
    if not hasattr(args, "student_vocab_size"):
        return None
    return LogitCacheSettings(args.output, args.top_k, args.kd_temperature or 1.0, args.cache_dtype,
                              args.student_vocab_size)


def _caches(r: Request) -> bool:
    return hasattr(r.args, "student_vocab_size")


def _distils(r: Request) -> bool:
    return r.fine_tunes and r.args.teacher is not None


def _needs_teacher(name: str) -> Rule:
    option = f"--{name.replace('_', '-')}"
    return Rule(f"{option} needs a teacher", lambda r: r.fine_tunes and not _distils(r) and not (
        _caches(r) and name == "kd_temperature") and getattr(r.args, name) is not None,
        f"{option}{'' if name == 'kd_temperature_squared' else f' {{r.args.{name}}}'} needs --teacher")


DISTILLATION = (
    *(_needs_teacher(name) for name in _OF_TEACHER),
    Rule("preferences are learnt without a teacher", lambda r: _distils(r) and r.args.objective != SFT,
         "--teacher {r.args.teacher} conflicts with --objective {r.args.objective}: distillation is of conversations"),
    Rule("distillation is a mean over tokens", lambda r: _distils(r) and r.args.loss_average != "token",
         "--loss-average {r.args.loss_average} conflicts with --teacher {r.args.teacher}, whose loss is a mean over "
         "tokens"),
    Rule("the teacher's weight is for jsd",
         lambda r: _distils(r) and r.args.kd_jsd_beta is not None and r.args.kd_loss != "jsd",
         "--kd-jsd-beta {r.args.kd_jsd_beta} needs --kd-loss jsd, not {r.args.kd_loss}"),
    Rule("jsd at its ends is 0", lambda r: _distils(r) and r.args.kd_jsd_beta in (0, 1),
         "--kd-jsd-beta {r.args.kd_jsd_beta} makes the divergence 0 whatever the student says; its limits are "
         "--kd-loss forward-kl (0) and reverse-kl (1)"),
    Rule("the teacher is the run's own directory",
         lambda r: _distils(r) and r.args.save is not None and r.args.teacher.resolve() == r.args.save.resolve(),
         "--teacher {r.args.teacher} is the --save directory: a run that learns from its own checkpoints goes nowhere"),
    Rule("a cache is of weights", lambda r: _caches(r) and r.args.load is None,
         "--output {r.args.output} needs --load, the teacher's weights"),
    Rule("a cache is of a teacher alone", lambda r: _caches(r) and _distils(r),
         "--teacher {r.args.teacher} is for training; here the teacher is --load"),
    Rule("a cache is of conversations", lambda r: _caches(r) and r.args.objective != SFT,
         "--objective {r.args.objective} is for training; a cache is of conversations"),
    Rule("more ids are kept than there are",
         lambda r: _caches(r) and r.args.top_k > (r.args.student_vocab_size or r.model.vocab_size),
         "--top-k {r.args.top_k} is more than the vocabulary has ids"),
)
