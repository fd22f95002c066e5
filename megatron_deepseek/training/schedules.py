"""The learning rate and the update rate of the routers' bias, as pure functions of the samples consumed.

Nothing here keeps state, so a resumed run computes the same rates. The meaning of every
style but deepseek-v3 is that of Megatron-LM (`megatron.core.optimizer_param_scheduler`), which counts samples too.
"""

import math
from dataclasses import dataclass

from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.settings import BatchSettings, LearningRateSettings, LossSettings, RunSettings
from megatron_deepseek.training.timeline import Timeline, timeline

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD", "deepseek-v3")
WSD_DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")


@dataclass(frozen=True)
class Schedule:
    """The learning-rate settings of one run, with their lengths in samples.

    `decay` is where the decay ends, `wsd_decay` the length of WSD's fall, which ends there too. `warmup` may be a
    fraction of a sample, as in Megatron.
    """

    rates: LearningRateSettings
    decay: int
    warmup: float = 0
    wsd_decay: int = 0


def learning_rate(schedule: Schedule, consumed_samples: int) -> float:
    """Return the rate of the update before which `consumed_samples` were consumed, 0 for the first update of a run.

    Megatron-LM advances its scheduler after each update by the samples of the batch. Here too an update has the rate of
    the samples before it, and the first update of a warm-up has lr_warmup_init. (Megatron's log shows the rate after
    the advance, that of the next update.)
    """
    settings, warmup, decay = schedule.rates, schedule.warmup, schedule.decay
    if warmup > 0 and consumed_samples <= warmup:
        rise = settings.lr - settings.lr_warmup_init
        return settings.lr_warmup_init + rise * consumed_samples / warmup
    if settings.lr_decay_style == "constant":
        return settings.lr
    if settings.lr_decay_style == "deepseek-v3":
        return _deepseek_v3(settings, consumed_samples, decay)
    if consumed_samples > decay:
        return settings.min_lr
    if settings.lr_decay_style == "inverse-square-root":
        return max(settings.min_lr, settings.lr * math.sqrt(max(warmup, 1) / max(consumed_samples, 1)))
    if settings.lr_decay_style == "WSD":
        start, style = decay - schedule.wsd_decay, settings.lr_wsd_decay_style
    else:
        start, style = warmup, settings.lr_decay_style
    fall = _fall(style, (consumed_samples - start) / (decay - start)) if consumed_samples > start else 1.0
    return settings.min_lr + fall * (settings.lr - settings.min_lr)


def _fall(style: str, progress: float) -> float:
    """Return the part of `lr - min_lr` that is left after `progress` (0 to 1) of a decay."""
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * progress) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**progress - 1.0
    assert style == "minus_sqrt", style
    return 1.0 - math.sqrt(progress)


def _deepseek_v3(settings: LearningRateSettings, consumed_samples: int, total: int) -> float:
    """Return V3's rate: constant, cosine to min_lr, min_lr, then lr_final (V3 report, section 4.2).

    Phases are whole samples. The last one is measured from the end of `total` samples, so that it has its full length;
    what rounding leaves over goes to the phase before it.
    """
    constant = round(settings.lr_constant_fraction * total)
    cosine = round(settings.lr_cosine_fraction * total)
    if consumed_samples >= total - round(settings.lr_final_fraction * total):
        return settings.lr_final
    if consumed_samples <= constant:
        return settings.lr
    if consumed_samples >= constant + cosine:
        return settings.min_lr
    fall = _fall("cosine", (consumed_samples - constant) / cosine)
    return settings.min_lr + fall * (settings.lr - settings.min_lr)


def bias_rate(loss: LossSettings, state: TrainState, size: int) -> float:
    """Return the step of the routers' bias in the update after `state`, whose batch has `size` sequences.

    The bias stops after moe_router_bias_update_until iterations, or with the last whole batch of
    moe_router_bias_update_samples.
    """
    until, samples = loss.moe_router_bias_update_until, loss.moe_router_bias_update_samples
    over = (until is not None and state.iteration >= until) or (
        samples is not None and state.consumed_samples + size > samples)
    return 0.0 if over else loss.moe_router_bias_update_rate


def schedule_of(rates: LearningRateSettings, run: RunSettings, batch: BatchSettings,
                state: TrainState = TrainState()) -> Schedule:
    """Return the schedule of a run that is at `state`, with all lengths in samples.

    A length in iterations is the samples of the run's own batches: for the warm-up of its first ones, for WSD's fall of
    the last ones before the decay ends. The decay ends with the run unless its end is given. (Megatron-LM takes every
    iteration for one of global_batch_size, and refuses a ramp together with lengths in iterations.)

    Raise ValueError, which names arguments and values, for a schedule that contradicts itself.
    """
    check_learning_rate(rates)
    line = timeline(batch, state)
    decay = _decay_end(rates, run, line)
    schedule = Schedule(rates, decay, _warmup(rates, line, decay), _wsd_decay(rates, run, line, decay))
    _check_lengths(schedule, run)
    return schedule


def _decay_end(rates: LearningRateSettings, run: RunSettings, line: Timeline) -> int:
    """Return the sample at which the decay ends: as given, else at the end of the run.

    With --train-samples the decay is over all of them, also where the last batch does not fit.
    """
    if rates.lr_decay_samples is not None:
        return rates.lr_decay_samples
    if rates.lr_decay_iters is not None:
        return line.samples(rates.lr_decay_iters)
    return line.samples(run.train_iters) if run.train_samples is None else run.train_samples


def _warmup(rates: LearningRateSettings, line: Timeline, decay: int) -> float:
    if rates.lr_warmup_samples is not None:
        return rates.lr_warmup_samples
    if rates.lr_warmup_iters is not None:
        return line.samples(rates.lr_warmup_iters)
    return (rates.lr_warmup_fraction or 0) * decay


def _wsd_decay(rates: LearningRateSettings, run: RunSettings, line: Timeline, decay: int) -> int:
    if rates.lr_wsd_decay_iters is None:
        return rates.lr_wsd_decay_samples or 0
    by_iteration = rates.lr_decay_samples is None and (rates.lr_decay_iters or run.train_samples is None)
    last = (rates.lr_decay_iters or run.train_iters) if by_iteration else line.iterations(decay)
    if rates.lr_wsd_decay_iters > last:
        raise ValueError(f"--lr-wsd-decay-iters {rates.lr_wsd_decay_iters} is longer than {_decay_named(rates, run)} "
                         f"({last} iterations)")
    return decay - line.samples(last - rates.lr_wsd_decay_iters)


def check_learning_rate(settings: LearningRateSettings) -> None:
    """Raise ValueError for rates that contradict each other."""
    if settings.lr_decay_style not in DECAY_STYLES:
        raise ValueError(f"lr_decay_style {settings.lr_decay_style!r} is not one of {', '.join(DECAY_STYLES)}")
    if not 0 <= settings.min_lr <= settings.lr:
        raise ValueError(f"min_lr {settings.min_lr} is not between 0 and lr {settings.lr}")
    if not 0 <= settings.lr_warmup_init <= settings.lr:
        raise ValueError(f"lr_warmup_init {settings.lr_warmup_init} is not between 0 and lr {settings.lr}")
    if settings.lr_decay_style == "WSD" and settings.lr_wsd_decay_style not in WSD_DECAY_STYLES:
        raise ValueError(f"lr_wsd_decay_style {settings.lr_wsd_decay_style!r} is not one of "
                         f"{', '.join(WSD_DECAY_STYLES)}")
    if settings.lr_decay_style == "deepseek-v3":
        _check_deepseek_v3(settings)


def _check_deepseek_v3(settings: LearningRateSettings) -> None:
    fractions = (settings.lr_constant_fraction, settings.lr_cosine_fraction, settings.lr_final_fraction)
    if min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError("lr_constant_fraction {}, lr_cosine_fraction {} and lr_final_fraction {} "
                         "are not parts of one whole".format(*fractions))
    if settings.lr_final < 0:
        raise ValueError(f"lr_final {settings.lr_final} is negative")


def _check_lengths(schedule: Schedule, run: RunSettings) -> None:
    rates, decay, warmup = schedule.rates, schedule.decay, schedule.warmup
    if rates.lr_decay_style == "constant":
        return
    length = f"{_decay_named(rates, run)} ({decay} samples)"
    if decay <= warmup:
        raise ValueError(f"{_named(rates, 'lr_warmup')} ({warmup:.12g} samples) does not end before the decay, "
                         f"{length}")
    if rates.lr_decay_style == "WSD" and not schedule.wsd_decay:
        raise ValueError("--lr-decay-style WSD needs --lr-wsd-decay-iters or --lr-wsd-decay-samples")
    if rates.lr_decay_style == "WSD" and schedule.wsd_decay > decay:
        raise ValueError(f"{_named(rates, 'lr_wsd_decay')} is longer than {length}")
    if rates.lr_decay_style == "deepseek-v3" and warmup > round(rates.lr_constant_fraction * decay):
        raise ValueError(f"{_named(rates, 'lr_warmup')} ({warmup:.12g} samples) outlasts --lr-constant-fraction "
                         f"{rates.lr_constant_fraction} of {length}")


def _decay_named(rates: LearningRateSettings, run: RunSettings) -> str:
    return _named(rates, "lr_decay") or _named(run, "train", ("samples", "iters"))


def _named(settings: LearningRateSettings | RunSettings, name: str, units=("iters", "samples", "fraction")) -> str:
    """Return a length as it was typed; "" if it was not given."""
    given = ((f"{name}_{unit}", getattr(settings, f"{name}_{unit}", None)) for unit in units)
    return next((f"--{field.replace('_', '-')} {value}" for field, value in given if value is not None), "")
