"""The objectives of fine-tuning: means over tokens or over samples to train on, and what is reported of held-out sets.

The mean over tokens is pre-training's NextToken: every token with a loss weight counts alike. In the mean over samples
a short answer counts as much as a long one. Both are sums divided by counts of the global batch, so neither depends on
micro-batches, accumulation, data or context ranks: samples with the token losses [1, 2, 3] and [8] give 3.5 over tokens
and 5 over samples, however they are spread.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.training.acceptance import Validation, ValidationLosses
from megatron_deepseek.training.next_token import NextToken

LOSS_AVERAGES = ("token", "sample")


class SampleMean(NextToken):
    """The mean over samples of the weighted mean over their tokens, of the main prediction and of each MTP depth.

    A sample is a document of a packed row, or a row. One without a label (at a depth) does not count there.
    """

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        samples = {f"samples_{depth}": (rows.per_document(rows.weights_BMS[:, depth]) > 0).sum()
                   for depth in range(1 + self.num_depths)}
        return {**super().counts(rows), **samples}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        total, reports = 0.0, {}
        for depth in range(1 + predictions.num_depths):
            loss_BS, weights_BS = -predictions.log_probabilities(depth), rows.weights_BMS[:, depth]
            sums_BD, weights_BD = rows.per_document(loss_BS * weights_BS), rows.per_document(weights_BS)
            means_BD = sums_BD / weights_BD.where(weights_BD > 0, 1.0)
            loss = rows.share(means_BD) / (counts[f"samples_{depth}"] or 1.0)
            reports["lm_loss" if depth == 0 else f"mtp_loss_{depth}"] = loss
            if depth == 0:
                reports |= self.source_sums(loss_BS.detach(), rows)
            total = total + (loss if depth == 0 else loss * self.mtp_scale / predictions.num_depths)
        return Contribution(total, reports)


@dataclass(frozen=True)
class HeldOutLosses(ValidationLosses):
    """The losses of a batch that is not trained on: means over its tokens, and how many it predicts."""

    @property
    def correct(self) -> float:
        """Return how many labels had the largest logit, of `num_labels`."""
        return self.reports["correct"]


class HeldOut(Validation):
    """What is reported of an evaluation set: Validation's numbers, and how many labels are the likeliest token."""

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        made = super().contribution(predictions, rows, counts)
        likeliest_BS = predictions.for_chunks(VocabularyLogits.are_likeliest, rows.labels_BMS[:, 0])
        correct = (likeliest_BS & (rows.weights_BS != 0)).sum()
        return Contribution(made.loss, {**made.reports, "correct": correct})

    def reported(self, rows: Rows) -> tuple[str, ...]:
        return *super().reported(rows), "correct"

    def losses(self, reports: Mapping[str, float], balance_loss: float, counts: Mapping[str, float]) -> HeldOutLosses:
        return HeldOutLosses(reports, balance_loss, counts)


def objective_of(loss_average: str, num_depths: int, mtp_scale: float) -> NextToken:
    """Return the objective of --loss-average."""
    kind = {"token": NextToken, "sample": SampleMean}[loss_average]
    return kind(num_depths, mtp_scale)
