"""Rates and batch sizes against megatron-core's own scheduler and calculator, and V3's schedule worked by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_deepseek.training.schedules import (
    batch_sizes, check_learning_rate, global_batch_size, iterations_for_samples, learning_rate)
from megatron_deepseek.settings import BatchSettings, LearningRateSettings

BASE = LearningRateSettings(lr=3e-4, min_lr=2e-5, lr_decay_iters=37, lr_warmup_iters=5, lr_warmup_init=1e-6)


def megatron_scheduler(settings, lengths_in=1):
    """Megatron's scheduler over one fake parameter group; `lengths_in` samples an iteration."""
    optimizer = SimpleNamespace(param_groups=[{}])
    return optimizer, OptimizerParamScheduler(
        optimizer, init_lr=settings.lr_warmup_init, max_lr=settings.lr, min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters * lengths_in, lr_decay_steps=settings.lr_decay_iters * lengths_in,
        lr_decay_style=settings.lr_decay_style, start_wd=0.1, end_wd=0.1, wd_incr_steps=0, wd_incr_style="constant",
        wsd_decay_steps=settings.lr_wsd_decay_iters * lengths_in, lr_wsd_decay_style=settings.lr_wsd_decay_style)


def rates_of_megatron(settings, updates):
    """As Megatron-LM's train_step: the update runs at the group's rate, then the scheduler advances."""
    optimizer, scheduler = megatron_scheduler(settings)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return rates


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD-linear", "WSD-cosine",
                                   "WSD-exponential", "WSD-minus_sqrt"])
def test_every_update_runs_at_megatrons_rate(style, warmup):
    style, _, wsd = style.partition("-") if style.startswith("WSD") else (style, "", "linear")
    settings = dataclasses.replace(BASE, lr_decay_style=style, lr_warmup_iters=warmup, lr_wsd_decay_iters=11,
                                   lr_wsd_decay_style=wsd)
    ours = [learning_rate(settings, iteration) for iteration in range(45)]
    # The same arithmetic in another order: equal to a few units in the last place.
    assert ours == pytest.approx(rates_of_megatron(settings, 45), rel=1e-13)


def test_under_a_ramp_fractional_iterations_give_megatrons_rates():
    settings = dataclasses.replace(BASE, lr_decay_style="cosine")
    optimizer, scheduler = megatron_scheduler(settings, lengths_in=8)
    batches, consumed = BatchSettings(1, 8, (2, 2, 60)), 0
    while consumed < 37 * 8:
        assert learning_rate(settings, consumed / 8) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-13)
        size = global_batch_size(batches, consumed)
        scheduler.step(increment=size)
        consumed += size


def test_deepseek_v3_follows_the_report():
    """In units of 1e9 tokens of V3's 14.8T: 2K steps of warm-up, then the four phases of section 4.2."""
    settings = LearningRateSettings(lr=2.2e-4, min_lr=2.2e-5, lr_decay_style="deepseek-v3", lr_decay_iters=14800,
                                    lr_warmup_iters=30)
    expected = {0: 0.0, 15: 1.1e-4, 30: 2.2e-4, 10000: 2.2e-4, 12150: 1.21e-4, 14300: 2.2e-5, 14632: 2.2e-5,
                14633: 7.3e-6, 14799: 7.3e-6, 20000: 7.3e-6}
    assert {i: learning_rate(settings, i) for i in expected} == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(settings, i) for i in range(30, 14801)]
    assert all(now >= then for now, then in zip(rates, rates[1:]))
    assert sum(rate == 7.3e-6 for rate in rates[:-1]) == 167


@pytest.mark.parametrize("change, words", [
    ({"lr_decay_style": "cosinus"}, ["lr_decay_style", "cosinus", "deepseek-v3"]),
    ({"min_lr": 1e-3}, ["min_lr", "0.001", "0.0003"]),
    ({"lr_warmup_init": 1.0}, ["lr_warmup_init", "1.0", "0.0003"]),
    ({"lr_warmup_iters": 37}, ["lr_warmup_iters 37", "lr_decay_iters 37"]),
    ({"lr_warmup_iters": -1}, ["lr_warmup_iters -1"]),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 38}, ["lr_wsd_decay_iters 38", "lr_decay_iters 37"]),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_wsd_decay_style": "x"}, ["lr_wsd_decay_style 'x'"]),
    ({"lr_decay_style": "deepseek-v3", "lr_constant_fraction": 0.9}, ["lr_constant_fraction 0.9"]),
    ({"lr_decay_style": "deepseek-v3", "lr_warmup_iters": 30}, ["lr_warmup_iters 30", "lr_constant_fraction"])])
def test_a_contradiction_is_refused_by_name(change, words):
    with pytest.raises(ValueError) as refusal:
        check_learning_rate(dataclasses.replace(BASE, **change))
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("start, increment, samples, final", [
    (2, 2, 60, 8), (16, 8, 1000, 96), (3, 1, 10, 6),
    (1, 1, 9, 8)])
def test_ramp_is_megatrons(start, increment, samples, final):
    """The last case: 9 / (9 / 7) is below 7 in floating point, and Megatron's last size comes a sample late."""
    settings = BatchSettings(1, final, (start, increment, samples))
    calculator = RampupBatchsizeNumMicroBatchesCalculator(final, 1, 1, False, 1, start, increment, samples)
    sizes = set()
    for consumed in range(samples + 3 * final):
        calculator.update(consumed, consistency_check=False)
        assert global_batch_size(settings, consumed) == calculator.get_current_global_batch_size()
        sizes.add(global_batch_size(settings, consumed))
    assert batch_sizes(settings) == tuple(sorted(sizes))


def test_iterations_for_samples_counts_whole_batches():
    settings = BatchSettings(1, 8, (2, 2, 12))
    # Sizes change every 4 samples: 2 2 | 4 | 6 | 6 (12 + 2 = 14 > 12 is past the ramp) | 8 8 ...
    ends = [2, 4, 8, 14, 22, 30]
    for samples in range(31):
        assert iterations_for_samples(settings, samples) == sum(end <= samples for end in ends), samples
    assert iterations_for_samples(BatchSettings(1, 8), 39) == 4


def test_ramps_without_length_or_height_are_constant():
    assert global_batch_size(BatchSettings(1, 8, (8, 2, 100)), 0) == 8
    assert global_batch_size(BatchSettings(1, 8, (2, 2, 0)), 0) == 8


@pytest.mark.parametrize("ramp", [(0, 1, 10), (2, 0, 10), (2, 2, -1), (9, 1, 10), (3, 2, 10)])
def test_impossible_ramp_is_refused(ramp):
    with pytest.raises(ValueError, match="rampup_batch_size"):
        batch_sizes(BatchSettings(1, 8, ramp))
