"""What a dry run prints of the data: first samples with their trained tokens marked, counts, lengths, epochs."""

import math

import numpy as np

from megatron_deepseek.data.indexed import open_indexed
from megatron_deepseek.data.tokenizer import Tokenizer, build_tokenizer
from megatron_deepseek.finetuning.loss_weights import LossWeights
from megatron_deepseek.finetuning.plan import EpochPlan, batches_of, plan_epoch
from megatron_deepseek.finetuning.prepare import Prepared
from megatron_deepseek.finetuning.sample_values import VALUES, read_values
from megatron_deepseek.finetuning.settings import CONVERSATIONS, LABELLED
from megatron_deepseek.finetuning.summary import Counts

GREEN, GREY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"
BEGIN, END = "⟦", "⟧"
BAR = 40
MOST_TOKENS = 2000


def describe(prepared: Prepared, global_batch_size: int, samples: int = 3, colour: bool = False) -> str:
    """Return the text: trained tokens are green, or within ⟦ ⟧ where `colour` is False. No model, no torch."""
    plan = plan_epoch(prepared)
    lines = [f"template {prepared.template}: {prepared.mask_rule}", ""]
    lines += _first_samples(prepared, samples, colour)
    for name, counts in zip(prepared.names, prepared.counts):
        lines += _counted(name, counts)
    lines += ["", "tokens of a conversation", *histogram(np.concatenate(plan.lengths)), ""]
    return "\n".join([*lines, *_epoch(prepared, plan, global_batch_size)])


def _first_samples(prepared: Prepared, most: int, colour: bool) -> list[str]:
    settings = prepared.settings
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    file, weights = open_indexed(prepared.prefixes[0], settings.option), LossWeights(prepared.prefixes[0] + ".weights")
    ends, lines = np.cumsum(file.lengths[:most], dtype=np.int64), []
    sides = _sides(prepared, len(file.lengths))[:most]
    for number, (begin, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist())):
        own = weights.of(number)
        lines += [f"sample {number + 1}{sides[number]}: {end - begin} tokens, {int((own[1:] > 0).sum())} with loss",
                  marked(tokenizer, file.ids[begin:end], own, colour), ""]
    return lines


def _sides(prepared: Prepared, num_samples: int) -> list[str]:
    """Return what each sample of the first dataset is in preference data: a side of a pair, or a good or bad answer."""
    kind = prepared.settings.kind
    if kind == CONVERSATIONS:
        return [""] * num_samples
    if kind == LABELLED:
        return [", good" if value > 0 else ", bad" for value in read_values(prepared.prefixes[0] + VALUES, num_samples)]
    return [", chosen", ", rejected"] * (num_samples // 2)


def marked(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray, colour: bool) -> str:
    """Return the text of the ids with trained runs marked; a weight other than 1 is told. Long samples are cut."""
    weights, shown = weights.copy(), ids[:MOST_TOKENS].tolist()
    weights[0] = 0  # the first token is nobody's label
    borders = [0, *(np.flatnonzero(np.diff(weights[:len(shown)])) + 1).tolist(), len(shown)]
    parts = []
    for begin, end in zip(borders, borders[1:]):
        text, weight = tokenizer.decode(shown[begin:end]), float(weights[begin])
        note = "" if weight in (0.0, 1.0) else f"{weight:g}×"
        if colour:
            parts.append(f"{GREEN if weight else GREY}{note}{text}{PLAIN}")
        else:
            parts.append(f"{BEGIN}{note}{text}{END}" if weight else text)
    return "".join(parts) + (f" … {len(ids) - len(shown)} more tokens" if len(ids) > len(shown) else "")


def _counted(name: str, counts: Counts) -> list[str]:
    lines = [f"{name}: {counts.rows:,} rows, {counts.samples:,} samples, {counts.tokens:,} tokens, "
             f"{counts.trained:,} with loss ({counts.trained / max(counts.tokens, 1):.1%})"]
    lines += [f"  dropped {count:,}: {reason}" for reason, count in counts.dropped.items()]
    lines += [f"  not shown {count:,}: {what}" for what, count in counts.left_out.items()]
    return [*lines, *(f"  {message}" for message in counts.bad)]


def histogram(lengths: np.ndarray) -> list[str]:
    """Return lines with the number of lengths between powers of two."""
    if not len(lengths):
        return ["none"]
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers)
    first = int(powers.min())
    return [f"  {2 ** (power - 1) + 1 if power else 1:>8,} to {2 ** power:>8,}  {count:>10,}  "
            f"{'#' * math.ceil(BAR * count / counts.max())}" for power, count in enumerate(counts) if power >= first]


def _epoch(prepared: Prepared, plan: EpochPlan, global_batch_size: int) -> list[str]:
    settings, places = prepared.settings, plan.num_rows * prepared.settings.seq_length
    how = "packed best fit" if settings.packing else "one conversation a row"
    steps = batches_of(plan.num_rows, global_batch_size)
    return [f"an epoch: {len(plan.samples):,} samples in {plan.num_rows:,} rows of {settings.seq_length:,} ({how}, "
            f"{1 - plan.num_tokens / places:.1%} padding), {plan.num_tokens:,} tokens",
            f"steps per epoch with --global-batch-size {global_batch_size}: {steps:,.1f}"]
