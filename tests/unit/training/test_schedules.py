"""Learning rates against megatron-core's own scheduler and calculator, and what it has not worked by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st
from megatron.core.num_microbatches_calculator import (
    ConstantNumMicroBatchesCalculator, RampupBatchsizeNumMicroBatchesCalculator)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.settings import BatchSettings, LearningRateSettings, LossSettings, RunSettings
from megatron_deepseek.training.schedules import WSD_DECAY_STYLES, Schedule, bias_rate, learning_rate, schedule_of
from megatron_deepseek.training.timeline import global_batch_size

BASE = LearningRateSettings(lr=3e-4, min_lr=2e-5, lr_decay_iters=37, lr_warmup_iters=5, lr_warmup_init=1e-6)
STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]


class Megatron:
    """Its scheduler over one fake parameter group, advanced as Megatron-LM's train_step does: by a batch's samples."""

    def __init__(self, rates, warmup_steps, decay_steps, wsd_steps):
        self.optimizer = SimpleNamespace(param_groups=[{}])
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=rates.lr_warmup_init, max_lr=rates.lr, min_lr=rates.min_lr,
            lr_warmup_steps=warmup_steps, lr_decay_steps=decay_steps, lr_decay_style=rates.lr_decay_style,
            start_wd=0.1, end_wd=0.1, wd_incr_steps=0, wd_incr_style="constant", wsd_decay_steps=wsd_steps,
            lr_wsd_decay_style=rates.lr_wsd_decay_style)

    def rate_then_advance(self, samples: int) -> float:
        rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step(increment=samples)
        return rate


def megatron_batch_size(batch: BatchSettings, consumed: int) -> int:
    common = batch.global_batch_size, 1, 1, False, 1
    calculator = RampupBatchsizeNumMicroBatchesCalculator(*common, *batch.rampup_batch_size) \
        if batch.rampup_batch_size else ConstantNumMicroBatchesCalculator(*common)
    calculator.update(consumed, consistency_check=True)
    return calculator.get_current_global_batch_size()


@st.composite
def batches(draw) -> BatchSettings:
    start, increment, steps = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    ramp = draw(st.none() | st.just((start, increment, draw(st.integers(1, 200)))))
    return BatchSettings(1, start + steps * increment, ramp)


@st.composite
def rates(draw) -> LearningRateSettings:
    lr = draw(st.floats(1e-6, 1e-2))
    part = st.floats(0, 1)
    return LearningRateSettings(lr=lr, min_lr=lr * draw(part), lr_warmup_init=lr * draw(part),
                                lr_decay_style=draw(st.sampled_from(STYLES)),
                                lr_wsd_decay_style=draw(st.sampled_from(WSD_DECAY_STYLES)))


@given(rates(), batches(), batches(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_run_in_samples_has_megatrons_rates(rates, batch, later, data):
    """Under ramps, with a warm-up in samples or a fraction, and from somewhere on resumed with other batches."""
    draw = data.draw
    total = draw(st.integers(2, 500), "train_samples")
    decay = draw(st.none() | st.integers(2, 700), "lr_decay_samples")
    steps = total if decay is None else decay
    warmup, fraction = draw(st.none() | st.integers(0, steps - 1)), draw(st.none() | st.floats(0, 0.99))
    fraction = None if warmup is not None else fraction
    wsd = draw(st.integers(1, steps))
    rates = dataclasses.replace(rates, lr_decay_samples=decay, lr_warmup_samples=warmup, lr_warmup_fraction=fraction,
                                lr_wsd_decay_samples=wsd)
    run = RunSettings(0, train_samples=total)
    megatron = Megatron(rates, warmup if warmup is not None else (fraction or 0) * steps, steps, wsd)
    state, schedule = TrainState(), schedule_of(rates, run, batch)
    resumed = draw(st.integers(0, 40), "resumed at")
    for iteration in range(80):
        if iteration == resumed:
            batch, schedule = later, schedule_of(rates, run, later, state)
        size = megatron_batch_size(batch, state.consumed_samples)
        assert global_batch_size(batch, state.consumed_samples) == size
        # The same arithmetic in another order: equal to a few units in the last place, of lr where little is left.
        expected = megatron.rate_then_advance(size)
        ours = learning_rate(schedule, state.consumed_samples)
        assert ours == pytest.approx(expected, rel=1e-13, abs=1e-15 * rates.lr)
        state = state.after(size, True)


@given(rates(), st.integers(1, 20), st.data())
@settings(max_examples=100, deadline=None)
def test_a_run_in_iterations_has_megatrons_rates(rates, size, data):
    """Without a ramp, which Megatron refuses for such runs: an iteration is global_batch_size samples."""
    draw = data.draw
    total, decay = draw(st.integers(2, 60)), draw(st.none() | st.integers(2, 80))
    steps = decay or total
    warmup, fraction = draw(st.none() | st.integers(0, steps - 1)), draw(st.none() | st.floats(0, 0.99))
    fraction = None if warmup is not None else fraction
    wsd = draw(st.integers(1, steps))
    rates = dataclasses.replace(rates, lr_decay_iters=decay, lr_warmup_iters=warmup, lr_warmup_fraction=fraction,
                                lr_wsd_decay_iters=wsd)
    schedule = schedule_of(rates, RunSettings(total), BatchSettings(1, size))
    warmup_steps = warmup * size if warmup is not None else (fraction or 0) * steps * size
    megatron = Megatron(rates, warmup_steps, steps * size, wsd * size)
    for iteration in range(90):
        expected = megatron.rate_then_advance(size)
        assert learning_rate(schedule, iteration * size) == pytest.approx(expected, rel=1e-13, abs=1e-15 * rates.lr)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("style", [*STYLES[:-1], "WSD-linear", "WSD-cosine", "WSD-exponential", "WSD-minus_sqrt"])
def test_every_update_of_a_plain_run_has_megatrons_rate(style, warmup):
    style, _, wsd = style.partition("-") if style.startswith("WSD") else (style, "", "linear")
    rates = dataclasses.replace(BASE, lr_decay_style=style, lr_warmup_iters=warmup, lr_wsd_decay_iters=11,
                                lr_wsd_decay_style=wsd)
    megatron = Megatron(rates, warmup, 37, 11)
    schedule = schedule_of(rates, RunSettings(40), BatchSettings(1, 1))
    ours = [learning_rate(schedule, consumed) for consumed in range(45)]
    assert ours == pytest.approx([megatron.rate_then_advance(1) for _ in range(45)], rel=1e-13)


def rates_of(rates: LearningRateSettings, run: RunSettings, batch: BatchSettings, updates: int,
             state: TrainState = TrainState()) -> list[float]:
    """Of that many updates from `state` on, each divided by lr."""
    schedule, result = schedule_of(rates, run, batch, state), []
    for _ in range(updates):
        result.append(learning_rate(schedule, state.consumed_samples) / rates.lr)
        state = state.after(global_batch_size(batch, state.consumed_samples), True)
    return result


def test_a_warm_up_in_samples_is_not_rounded_to_batches():
    """10 samples under a ramp from 2 to 16: over after 5 batches of 2, as in Megatron; then lr, the peak."""
    rates = LearningRateSettings(lr=1e-3, lr_decay_style="constant", lr_warmup_samples=10)
    batch = BatchSettings(1, 16, (2, 2, 112))
    assert rates_of(rates, RunSettings(20), batch, 7) == pytest.approx([0, .2, .4, .6, .8, 1, 1], rel=1e-15)


def test_a_length_that_is_no_whole_number_of_batches():
    """V3's 1,536,000 samples are 187.5 batches of 8,192, not 188: update 187 is not quite at the peak."""
    rates = LearningRateSettings(lr_decay_style="constant", lr_warmup_samples=1_536_000)
    schedule = schedule_of(rates, RunSettings(1000), BatchSettings(1, 8192))
    assert learning_rate(schedule, 187 * 8192) / rates.lr == pytest.approx(187 / 187.5, rel=1e-15)
    assert learning_rate(schedule, 188 * 8192) == rates.lr


def test_a_fall_in_iterations_is_of_the_last_ones_under_a_ramp():
    """20 updates of 8 and 20 of 16, of which the last 10 are 160 samples: after 30 updates the fall begins."""
    rates = LearningRateSettings(lr_decay_style="WSD", lr_wsd_decay_iters=10)
    batch = BatchSettings(1, 16, (8, 8, 160))
    expected = [1.0] * 31 + [1 - n / 10 for n in range(1, 10)]
    assert rates_of(rates, RunSettings(40), batch, 40) == pytest.approx(expected, rel=1e-12)
    longer = dataclasses.replace(rates, lr_wsd_decay_iters=24)  # 4 updates of 8 and 20 of 16: 352 samples
    fell = [0, 8, 16, 24, *range(32, 352, 16)]
    expected = [1.0] * 16 + [1 - samples / 352 for samples in fell]
    assert rates_of(longer, RunSettings(40), batch, 40) == pytest.approx(expected, rel=1e-12)


def test_a_warm_up_in_iterations_is_of_the_first_ones_under_a_ramp():
    """22 updates: 20 of 8, 2 of 16, 192 samples."""
    rates = LearningRateSettings(lr_decay_style="constant", lr_warmup_iters=22)
    expected = [consumed / 192 for consumed in (*range(0, 160, 8), 160, 176, 192)] + [1.0]
    assert rates_of(rates, RunSettings(40), BatchSettings(1, 16, (8, 8, 160)), 24) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("size, left", [(8, [24, 32, 40]), (2, range(24, 48, 2))])
def test_a_run_in_samples_falls_over_its_samples_whatever_its_batches(size, left):
    """24 of 48 samples at batch 4, the rest at another size: linear in samples, to nothing at 48."""
    rates = LearningRateSettings(lr_decay_style="linear")
    found = rates_of(rates, RunSettings(0, train_samples=48), BatchSettings(1, size), len(left),
                     TrainState(6, 24, 6, ((6, 4),)))
    assert found == pytest.approx([1 - consumed / 48 for consumed in left], rel=1e-15)


def test_a_run_in_iterations_ends_its_decay_with_its_last_iteration():
    """10 of 20 iterations at batch 4, then 10 at 8: 120 samples in all; a warm-up of 10 iterations is over, and one of
    12 has 56 samples.
    """
    state, batch = TrainState(10, 40, 10, ((10, 4),)), BatchSettings(1, 8)
    rates = LearningRateSettings(lr_decay_style="linear")
    expected = [1 - consumed / 120 for consumed in range(40, 120, 8)]
    assert rates_of(rates, RunSettings(20), batch, 10, state) == pytest.approx(expected, rel=1e-15)
    risen = dataclasses.replace(rates, lr_decay_style="constant", lr_warmup_iters=10)
    assert rates_of(risen, RunSettings(20), batch, 2, state) == [1, 1]
    rising = dataclasses.replace(risen, lr_warmup_iters=12)
    assert rates_of(rising, RunSettings(20), batch, 4, state) == pytest.approx([40 / 56, 48 / 56, 1, 1], rel=1e-15)
    falling = dataclasses.replace(rates, lr_decay_style="WSD", lr_wsd_decay_iters=12)  # 2 of 4 and 10 of 8: 88 samples
    expected = [1 - consumed / 88 for consumed in range(8, 88, 8)]
    assert rates_of(falling, RunSettings(20), batch, 10, state) == pytest.approx(expected, rel=1e-15)


@given(rates(), st.lists(batches(), min_size=2, max_size=3), st.data())
@settings(max_examples=100, deadline=None)
def test_a_resume_without_changes_changes_no_rate(rates, legs, data):
    """Whatever sizes the run had before, and in whatever unit its lengths are: at any update, to the bit."""
    draw = data.draw
    rates = dataclasses.replace(rates, lr_warmup_iters=draw(st.integers(0, 29)),
                                lr_wsd_decay_iters=draw(st.integers(1, 30)))
    run, state = RunSettings(30), TrainState()
    for batch in legs:
        schedule = schedule_of(rates, run, batch, state)
        for _ in range(draw(st.integers(0, 10))):
            again = schedule_of(rates, run, batch, state)
            assert learning_rate(again, state.consumed_samples) == learning_rate(schedule, state.consumed_samples)
            state = state.after(global_batch_size(batch, state.consumed_samples), True)


def test_deepseek_v3_follows_the_report():
    """In units of 1e9 tokens of V3's 14.8T: 2K steps of warm-up, then the four phases of section 4.2."""
    schedule = Schedule(LearningRateSettings(lr=2.2e-4, min_lr=2.2e-5, lr_decay_style="deepseek-v3"), 14800, 30)
    expected = {0: 0.0, 15: 1.1e-4, 30: 2.2e-4, 10000: 2.2e-4, 12150: 1.21e-4, 14300: 2.2e-5, 14632: 2.2e-5,
                14633: 7.3e-6, 14799: 7.3e-6, 20000: 7.3e-6}
    assert {i: learning_rate(schedule, i) for i in expected} == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(schedule, i) for i in range(30, 14801)]
    assert all(now >= then for now, then in zip(rates, rates[1:]))
    assert sum(rate == 7.3e-6 for rate in rates[:-1]) == 167


def test_deepseek_v3s_phases_are_parts_of_the_samples():
    """Under a ramp of 20 updates of 8 and 20 of 16 the last eighth of 480 samples are 60: 3 updates, and 12 samples of
    the one before them, which begins too early.
    """
    rates = LearningRateSettings(lr=1.0, min_lr=0.5, lr_decay_style="deepseek-v3", lr_constant_fraction=0.25,
                                 lr_cosine_fraction=0.5, lr_final_fraction=0.125, lr_final=0.1)
    found = rates_of(rates, RunSettings(40), BatchSettings(1, 16, (8, 8, 160)), 40)
    assert found[:16] == [1.0] * 16 and found[16] < 1.0, "120 samples, 15 batches of 8"
    assert found[32] > 0.5 and found[33:37] == [0.5] * 4 and found[37:] == [0.1] * 3


def test_a_learning_rate_of_nothing_is_a_number():
    schedule = schedule_of(LearningRateSettings(lr=0.0, lr_warmup_iters=2), RunSettings(4), BatchSettings(1, 1))
    assert [learning_rate(schedule, consumed) for consumed in range(4)] == [0.0] * 4


def test_the_bias_stops_by_iterations_or_with_the_last_whole_batch():
    """Batches of 4: 10 samples hold two; the third would go beyond. Whatever size comes next is what counts."""
    state = TrainState(2, 8, 2, ((2, 4),))
    by_iteration = LossSettings(moe_router_bias_update_rate=0.1, moe_router_bias_update_until=3)
    by_samples = LossSettings(moe_router_bias_update_rate=0.1, moe_router_bias_update_samples=10)
    assert [bias_rate(by_iteration, TrainState(n), 4) for n in range(5)] == [0.1] * 3 + [0.0] * 2
    assert [bias_rate(by_samples, state, size) for size in (4, 3, 2, 1)] == [0.0, 0.0, 0.1, 0.1]
    assert bias_rate(LossSettings(moe_router_bias_update_rate=0.1), state, 4) == 0.1


@pytest.mark.parametrize("change, words", [
    ({"lr_decay_style": "cosinus"}, ["lr_decay_style", "cosinus", "deepseek-v3"]),
    ({"min_lr": 1e-3}, ["min_lr", "0.001", "0.0003"]),
    ({"lr_warmup_init": 1.0}, ["lr_warmup_init", "1.0", "0.0003"]),
    ({"lr_warmup_iters": 37}, ["--lr-warmup-iters 37 (74 samples)", "--lr-decay-iters 37 (74 samples)"]),
    ({"lr_decay_iters": None, "lr_warmup_iters": 50}, ["--lr-warmup-iters 50", "--train-iters 40 (80 samples)"]),
    ({"lr_decay_iters": None, "lr_decay_samples": 9}, ["--lr-warmup-iters 5", "--lr-decay-samples 9 (9 samples)"]),
    ({"lr_decay_style": "WSD"}, ["--lr-wsd-decay-iters or --lr-wsd-decay-samples"]),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 38}, ["--lr-wsd-decay-iters 38", "--lr-decay-iters 37"]),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_samples": 75}, ["--lr-wsd-decay-samples 75", "--lr-decay-iters 37 (74"]),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_wsd_decay_style": "x"}, ["lr_wsd_decay_style 'x'"]),
    ({"lr_decay_style": "deepseek-v3", "lr_constant_fraction": 0.9}, ["lr_constant_fraction 0.9"]),
    ({"lr_decay_style": "deepseek-v3", "lr_warmup_iters": 30}, ["--lr-warmup-iters 30", "--lr-constant-fraction"])])
def test_a_contradiction_is_refused_by_name(change, words):
    with pytest.raises(ValueError) as refusal:
        schedule_of(dataclasses.replace(BASE, **change), RunSettings(40), BatchSettings(1, 2))
    assert all(word in str(refusal.value) for word in words), refusal.value
