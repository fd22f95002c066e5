"""The command lines of distillation and of tools/cache_logits.py: what they refuse, and their defaults."""

from pathlib import Path

import pytest

from megatron_deepseek.arguments import Settings, parse
from megatron_deepseek.arguments.distillation import DISTILLATION
from megatron_deepseek.arguments.finetuning import build_finetuning_parser
from megatron_deepseek.cli.cache_logits import build_parser
from megatron_deepseek.fine_tuning_settings import DistillationSettings, LogitCacheSettings

BASE = "--model tiny --dataset chats.jsonl --seq-length 256"
REFUSED = {
    "--kd-loss needs a teacher": ("--kd-loss jsd", "--kd-loss jsd needs --teacher"),
    "--kd-temperature needs a teacher": ("--kd-temperature 2", "--kd-temperature 2.0 needs --teacher"),
    "--kd-jsd-beta needs a teacher": ("--kd-jsd-beta 0.5", "--kd-jsd-beta 0.5 needs --teacher"),
    "--kd-ratio needs a teacher": ("--kd-ratio 0.5", "--kd-ratio 0.5 needs --teacher"),
    "--kd-temperature-squared needs a teacher": ("--kd-temperature-squared", "-squared needs --teacher"),
    "--teacher-expert-model-parallel-size needs a teacher": ("--teacher-expert-model-parallel-size 2",
                                                             "-size 2 needs --teacher"),
    "preferences are learnt without a teacher": ("--teacher t --objective dpo",
                                                 "--teacher t conflicts with --objective dpo"),
    "distillation is a mean over tokens": ("--teacher t --loss-average sample", "conflicts with --teacher t"),
    "the teacher's weight is for jsd": ("--teacher t --kd-jsd-beta 0.5", "--kd-jsd-beta 0.5 needs --kd-loss jsd"),
    "jsd at its ends is 0": ("--teacher t --kd-loss jsd --kd-jsd-beta 1", "--kd-jsd-beta 1.0 makes the divergence 0"),
    "the teacher is the run's own directory": ("--teacher t --save ./t", "--teacher t is the --save directory"),
}
REFUSED_CACHES = {
    "a cache is of weights": ("--output c", "--output c needs --load"),
    "a cache is of a teacher alone": ("--output c --load t --teacher t", "the teacher is --load"),
    "a cache is of conversations": ("--output c --load t --objective dpo", "--objective dpo is for training"),
    "more ids are kept than there are": ("--output c --load t --student-vocab-size 9 --top-k 10", "--top-k 10 is more"),
}


def settings(more: str = "") -> Settings:
    return parse(f"{BASE} {more}".split(), 1, None, build_finetuning_parser)


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_CACHES])
def test_table_refuses(name):
    arguments, fragment = (REFUSED | REFUSED_CACHES)[name]
    parser = build_parser if name in REFUSED_CACHES else build_finetuning_parser
    with pytest.raises(ValueError) as caught:
        parse(f"{BASE} {arguments}".split(), 1, None, parser)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_every_rule_is_tried():
    assert {rule.name for rule in DISTILLATION} == REFUSED.keys() | REFUSED_CACHES.keys()


@pytest.mark.parametrize("option", ["--kd-temperature 0", "--kd-temperature nan", "--kd-ratio 1.5", "--kd-loss mse"])
def test_values_out_of_bounds(option):
    with pytest.raises(ValueError, match=option.split()[0]):
        settings(f"--teacher t {option}")


def test_defaults():
    """Without a teacher nothing changes; with one the loss is the forward divergence alone, as it is."""
    assert settings().fine_tuning.distillation is None and settings().fine_tuning.logit_cache is None
    made = settings("--teacher t").fine_tuning.distillation
    assert made == DistillationSettings(Path("t"), "forward-kl", 1.0, 0.5, 1.0, False, 1) and made.factor == 1.0
    asked = settings("--teacher t --kd-loss jsd --kd-jsd-beta 0.2 --kd-ratio 0.3 --kd-temperature 2 "
                     "--kd-temperature-squared --teacher-expert-model-parallel-size 4")
    assert asked.fine_tuning.distillation == DistillationSettings(Path("t"), "jsd", 2.0, 0.2, 0.3, True, 4)


def test_caches():
    made = parse(f"{BASE} --load t --output c".split(), 1, None, build_parser).fine_tuning
    assert made.logit_cache == LogitCacheSettings(Path("c"), 64, 1.0, "fp16", None) and made.distillation is None
    made = parse(f"{BASE} --load t --output c --top-k 8 --kd-temperature 3 --cache-dtype fp32 --student-vocab-size 100"
                 .split(), 1, None, build_parser).fine_tuning
    assert made.logit_cache == LogitCacheSettings(Path("c"), 8, 3.0, "fp32", 100)
