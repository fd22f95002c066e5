"""What changes during a run by plan: the learning rate and the global batch size, as pure functions of progress.

Nothing here keeps state, so a resumed run asks the same questions and gets the same answers. The meaning of every
style but deepseek-v3 is that of Megatron-LM (`megatron.core.optimizer_param_scheduler`, `num_microbatches_calculator`).
"""

import math

from megatron_deepseek.settings import BatchSettings, LearningRateSettings

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD", "deepseek-v3")
WSD_DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")


def learning_rate(settings: LearningRateSettings, iteration: float) -> float:
    """The rate of the update that `iteration` updates came before: the first update of a run asks for iteration 0.

    Megatron-LM advances its scheduler after each update, so its i-th update, counted from 0, uses `num_steps == i`;
    so does this one, and the first update of a warm-up runs at lr_warmup_init. (Megatron's log shows the rate after
    the advance, that of the next update.)

    Under a batch-size ramp Megatron counts samples: give `consumed_samples / global_batch_size` as the iteration, with
    every length divided likewise, for the same rates.
    """
    check_learning_rate(settings)
    if settings.lr_warmup_iters > 0 and iteration <= settings.lr_warmup_iters:
        rise = settings.lr - settings.lr_warmup_init
        return settings.lr_warmup_init + rise * iteration / settings.lr_warmup_iters
    if settings.lr_decay_style == "constant":
        return settings.lr
    if settings.lr_decay_style == "deepseek-v3":
        return _deepseek_v3(settings, iteration)
    if iteration > settings.lr_decay_iters:
        return settings.min_lr
    if settings.lr_decay_style == "inverse-square-root":
        return max(settings.min_lr, settings.lr * math.sqrt(max(settings.lr_warmup_iters, 1) / max(iteration, 1)))
    if settings.lr_decay_style == "WSD":
        start = settings.lr_decay_iters - settings.lr_wsd_decay_iters
        style, length = settings.lr_wsd_decay_style, settings.lr_wsd_decay_iters
    else:
        start = settings.lr_warmup_iters
        style, length = settings.lr_decay_style, settings.lr_decay_iters - start
    fall = _fall(style, (iteration - start) / length) if iteration > start else 1.0
    return settings.min_lr + fall * (settings.lr - settings.min_lr)


def _fall(style: str, progress: float) -> float:
    """How much of `lr - min_lr` is left after `progress` (0 to 1) of a decay."""
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * progress) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**progress - 1.0
    assert style == "minus_sqrt", style
    return 1.0 - math.sqrt(progress)


def _deepseek_v3(settings: LearningRateSettings, iteration: float) -> float:
    """Constant, cosine to min_lr, min_lr, then lr_final (V3 report, section 4.2); phases are whole iterations.

    The last phase is measured from the end of lr_decay_iters, so that it has its full length whatever the others'
    rounding leaves to the phase before it.
    """
    total = settings.lr_decay_iters
    constant = round(settings.lr_constant_fraction * total)
    cosine = round(settings.lr_cosine_fraction * total)
    if iteration >= total - round(settings.lr_final_fraction * total):
        return settings.lr_final
    if iteration <= constant:
        return settings.lr
    if iteration >= constant + cosine:
        return settings.min_lr
    return settings.min_lr + _fall("cosine", (iteration - constant) / cosine) * (settings.lr - settings.min_lr)


def check_learning_rate(settings: LearningRateSettings) -> None:
    """ValueError for a schedule that contradicts itself; arguments.py calls it before anything is built."""
    if settings.lr_decay_style not in DECAY_STYLES:
        raise ValueError(f"lr_decay_style {settings.lr_decay_style!r} is not one of {', '.join(DECAY_STYLES)}")
    if not 0 <= settings.min_lr <= settings.lr:
        raise ValueError(f"min_lr {settings.min_lr} is not between 0 and lr {settings.lr}")
    if not 0 <= settings.lr_warmup_init <= settings.lr:
        raise ValueError(f"lr_warmup_init {settings.lr_warmup_init} is not between 0 and lr {settings.lr}")
    if settings.lr_warmup_iters < 0:
        raise ValueError(f"lr_warmup_iters {settings.lr_warmup_iters} is negative")
    if settings.lr_decay_style == "constant":
        return
    if settings.lr_decay_iters <= settings.lr_warmup_iters:
        raise ValueError(f"lr_decay_iters {settings.lr_decay_iters} does not reach past "
                         f"lr_warmup_iters {settings.lr_warmup_iters}")
    if settings.lr_decay_style == "WSD":
        _check_wsd(settings)
    if settings.lr_decay_style == "deepseek-v3":
        _check_deepseek_v3(settings)


def _check_wsd(settings: LearningRateSettings) -> None:
    if settings.lr_wsd_decay_style not in WSD_DECAY_STYLES:
        raise ValueError(f"lr_wsd_decay_style {settings.lr_wsd_decay_style!r} is not one of "
                         f"{', '.join(WSD_DECAY_STYLES)}")
    if not 0 < settings.lr_wsd_decay_iters <= settings.lr_decay_iters:
        raise ValueError(f"lr_wsd_decay_iters {settings.lr_wsd_decay_iters} is not between 1 and "
                         f"lr_decay_iters {settings.lr_decay_iters}")


def _check_deepseek_v3(settings: LearningRateSettings) -> None:
    fractions = (settings.lr_constant_fraction, settings.lr_cosine_fraction, settings.lr_final_fraction)
    if min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError("lr_constant_fraction {}, lr_cosine_fraction {} and lr_final_fraction {} "
                         "are not parts of one whole".format(*fractions))
    if settings.lr_final < 0:
        raise ValueError(f"lr_final {settings.lr_final} is negative")
    if settings.lr_warmup_iters > round(settings.lr_constant_fraction * settings.lr_decay_iters):
        raise ValueError(f"lr_warmup_iters {settings.lr_warmup_iters} outlasts lr_constant_fraction "
                         f"{settings.lr_constant_fraction} of lr_decay_iters {settings.lr_decay_iters}")


def global_batch_size(settings: BatchSettings, consumed_samples: int) -> int:
    """Sequences in the batch of the next update, when `consumed_samples` came before it.

    The ramp takes equal numbers of samples to each size below the last. The division is Megatron's, in floating
    point, so that a run moved over from it changes size at the same sample.
    """
    sizes = batch_sizes(settings)
    if len(sizes) == 1 or consumed_samples > settings.rampup_batch_size[2]:
        return settings.global_batch_size
    samples_per_size = settings.rampup_batch_size[2] / (len(sizes) - 1)
    return sizes[int(consumed_samples / samples_per_size)] if samples_per_size else settings.global_batch_size


def batch_sizes(settings: BatchSettings) -> tuple[int, ...]:
    """Every global batch size of the run, ascending: each must divide among micro-batches and data ranks."""
    if settings.rampup_batch_size is None:
        return (settings.global_batch_size,)
    start, increment, samples = settings.rampup_batch_size
    if start < 1 or increment < 1 or samples < 0:
        raise ValueError(f"rampup_batch_size {start} {increment} {samples} is not a size, an increment and a length")
    if start > settings.global_batch_size:
        raise ValueError(f"rampup_batch_size starts at {start}, above global_batch_size {settings.global_batch_size}")
    if (settings.global_batch_size - start) % increment:
        raise ValueError(f"rampup_batch_size {start} does not reach global_batch_size {settings.global_batch_size} "
                         f"in increments of {increment}")
    return tuple(range(start, settings.global_batch_size + 1, increment))


def iterations_for_samples(settings: BatchSettings, samples: int) -> int:
    """How many whole batches fit into `samples`; a last partial batch is left out, as Megatron does."""
    iterations = consumed = 0
    ramp_samples = settings.rampup_batch_size[2] if settings.rampup_batch_size else -1
    while consumed <= ramp_samples:
        size = global_batch_size(settings, consumed)
        if consumed + size > samples:
            return iterations
        consumed += size
        iterations += 1
    return iterations + max(samples - consumed, 0) // settings.global_batch_size
