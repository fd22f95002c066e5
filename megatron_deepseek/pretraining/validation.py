"""Validation in pre-training: some batches of the validation data or all of them, of its blend or of each dataset."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.data.blend import short_names
from megatron_deepseek.data.samples import BlendedSamples, EverySample, PackedSamples
from megatron_deepseek.runtime.megatron_curves import perplexity, validation_curves
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.acceptance import Validation, ValidationLosses, mean_acceptance
from megatron_deepseek.training.next_token import SourceSum, by_source
from megatron_deepseek.training.trainer import Trainer


@dataclass(frozen=True)
class ValidationSet:
    """What is evaluated as one: `name` is "" for the one set of a run, else the set's own; `curve` is what Megatron-LM
    adds to the names of its curves: the name that was given, or the set's number.
    """

    data: Sampler
    name: str = ""
    curve: str = ""


def validation_sets(settings: Settings, valid: PackedSamples | BlendedSamples | list[PackedSamples], prefix: str,
                    eod: int | None) -> list[ValidationSet]:
    """Return the sets of the validation data, which is a list of datasets where each is read by itself."""
    vocab_size, names = settings.model.vocab_size, settings.data.validation_set_names
    if not settings.data.multiple_validation_sets:
        dataset = EverySample(valid) if settings.data.full_validation else valid
        return [ValidationSet(Sampler(dataset, vocab_size, prefix, eod))]
    shown = names or short_names([each.split.prefix for each in valid])
    return [ValidationSet(Sampler(EverySample([each]) if settings.data.full_validation else each, vocab_size,
                                  each.split.prefix, eod), name, f"-{names[number] if names else number}")
            for number, (each, name) in enumerate(zip(valid, shown, strict=True))]


def validate(settings: Settings, sets: list[ValidationSet], trainer: Trainer, report: Report, iteration: int) -> None:
    """Report the mean losses over the labels of the same batches of each set every time."""
    objective = Validation(trainer.objective.num_depths)
    for each in sets:
        losses = [trainer.evaluate(batch.to(trainer.meshes.device), objective)
                  for batch in _batches(settings, each.data, trainer.meshes.rank("dp"))]
        of_set = f" of {each.name}" if each.name else ""
        if not any(batch.num_labels for batch in losses):
            report.message(f"validation{of_set}: all labels are masked; its loss of 0 says nothing")
        lm_loss = _mean([(batch.lm_loss, batch.num_labels) for batch in losses])
        mtp_loss = tuple(map(_mean, zip(*(zip(batch.mtp_loss, batch.mtp_labels) for batch in losses))))
        if each.name:
            report.held_out(iteration, each.name, {
                "loss": lm_loss, "perplexity": perplexity(lm_loss), "mtp_loss": mtp_loss,
                "mtp_acceptance": mean_acceptance(losses)})
        else:
            report.validation(iteration, lm_loss, mtp_loss, _source_loss(each.data, losses), mean_acceptance(losses))
        report.curves(iteration, validation_curves(settings.run, each.curve, lm_loss, mtp_loss))


def _batches(settings: Settings, data: Sampler, dp_rank: int) -> Iterator[Batch]:
    batch = settings.batch
    ranks = dp_rank, settings.layout.dp
    if settings.data.full_validation:
        return data.every_sample(batch.global_batch_size, batch.micro_batch_size, *ranks)
    return data.evaluation(settings.run.eval_iters, batch.global_batch_size, batch.micro_batch_size, *ranks)


def _source_loss(data: Sampler, losses: list[ValidationLosses]) -> dict[str, float] | None:
    sums = [SourceSum(*map(sum, zip(*batches))) for batches in zip(*[each.sources for each in losses])]
    return by_source(data.source_names, sums)[0]


def _mean(losses) -> float:
    """Return the mean of (loss, labels) over the labels, 0 where there are none."""
    losses = list(losses)
    return sum(loss * labels for loss, labels in losses) / (sum(labels for _, labels in losses) or 1.0)
