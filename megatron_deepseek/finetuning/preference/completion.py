"""What the model of the moment computes for a batch before its step: KTO's KL term, and with adapters the reference.

Beside adapters the base is the reference: it is there already, and one forward without the adapters gives its numbers.

KTO's z (arXiv 2402.01306, section 4.1) is what the policy departs from the reference by: the mean over answers behind
questions of others of log p - log p_reference, at least 0, and a constant to the gradient. It is taken over the global
batch, so that it depends on no layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.finetuning.preference.inputs import take_mismatched
from megatron_deepseek.finetuning.preference.objectives import DIVERGENCE, REFERENCE
from megatron_deepseek.model.lora import adapters_off
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.sequence_sums import SequenceSums
from megatron_deepseek.parallel.sums import sum_numbers
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer


@dataclass(frozen=True)
class Completion:
    """Gives a batch its KL term, where `has_divergence`, and the base's log-probabilities, where `by_base`."""

    has_divergence: bool
    by_base: bool

    def __call__(self, trainer: Trainer, batch: Batch) -> Batch:
        mismatched = None
        if self.has_divergence:
            batch, mismatched = take_mismatched(batch)
        if self.by_base:
            with adapters_off(trainer.stages):
                batch = _scored(trainer, batch)
                mismatched = None if mismatched is None else _scored(trainer, mismatched)
        if mismatched is None:
            return batch
        z = divergence(trainer, mismatched)
        return replace(batch, per_row={**batch.per_row, DIVERGENCE: batch.weights_BS.new_full(
            (batch.num_rows,), z, dtype=torch.float64)})


def completion_of(settings: Settings) -> Callable[[Trainer, Batch], Batch] | None:
    """Return what completes the batches of a run, None if nothing is to be computed for them."""
    preference = settings.fine_tuning.preference
    found = Completion(preference.objective == "kto", preference.has_reference and settings.lora is not None)
    return found if found.has_divergence or found.by_base else None


def weighted_scores(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Return log p(label) times the label's weight, float64 [B, S], without dropout or noise."""
    plain = replace(batch, per_token={}, per_row={})
    return trainer.score(plain).log_probabilities_BS.double() * batch.weights_BS


def _scored(trainer: Trainer, batch: Batch) -> Batch:
    """Return the batch with what the model gives its tokens as the reference's log-probabilities."""
    return replace(batch, per_token={**batch.per_token, REFERENCE: weighted_scores(trainer, batch)})


def divergence(trainer: Trainer, mismatched: Batch) -> float:
    """Return KTO's z of the global batch, of this data rank's mismatched answers; 0 if there are none."""
    sums, meshes = SequenceSums(Documents.find(mismatched.documents_BS)), trainer.meshes
    there_BD = sums.per_document(mismatched.weights_BS) > 0
    ratios_BD = sums.per_document(weighted_scores(trainer, mismatched) - mismatched.per_token[REFERENCE])
    total, number = sum_numbers(((ratios_BD * there_BD).sum(), there_BD.sum()), meshes.device, meshes.group("dp"))
    return max(0.0, total / (number or 1.0))
