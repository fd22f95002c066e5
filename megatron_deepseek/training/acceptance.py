"""How often MTP's drafts would be accepted: measured on held-out text, without generating any.

Speculative decoding keeps a draft while it is the token that the main model takes itself. On given text, where both see
the same true tokens, this is a comparison of likeliest tokens: depth k at position i and the main model at position
i + k predict the same token. The share of agreement is what a draft of depth k is accepted with, given that those
before it were (DeepSeek-V3 report, section 5.4.3, has 85 to 90 % for depth 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.training.next_token import NextToken, NextTokenLosses


@dataclass(frozen=True)
class ValidationLosses(NextTokenLosses):
    """The losses of a batch that is not trained on, and of each MTP depth which part of its drafts agree."""

    @property
    def mtp_acceptance(self) -> tuple[float, ...]:
        return tuple(self.reports[f"mtp_acceptance_{depth}"] for depth in range(1, 1 + len(self.mtp_loss)))

    @property
    def mtp_labels(self) -> tuple[float, ...]:
        """Return how many drafts of each depth were compared."""
        return tuple(self.counts[f"labels_{depth}"] for depth in range(1, 1 + len(self.mtp_loss)))


class Validation(NextToken):
    """What is reported of held-out text: NextToken's losses, and the acceptance of MTP's drafts.

    A draft counts where its token is a label of its depth: the main model's position is then in the same document.
    """

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        drafts = {f"labels_{depth}": (rows.weights_BMS[:, depth] != 0).sum() for depth in range(1, 1 + self.num_depths)}
        return {**super().counts(rows), **drafts}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        made = super().contribution(predictions, rows, counts)
        if not self.num_depths:
            return made
        main_BS = predictions.for_chunks(VocabularyLogits.likeliest)
        reports = dict(made.reports)
        for depth in range(1, 1 + self.num_depths):
            draft_BS = predictions.for_chunks(VocabularyLogits.likeliest, depth=depth)
            agree_BS = (draft_BS == rows.later(main_BS, depth)) & (rows.weights_BMS[:, depth] != 0)
            reports[f"mtp_acceptance_{depth}"] = agree_BS.sum().double() / (counts[f"labels_{depth}"] or 1.0)
        return Contribution(made.loss, reports)

    def reported(self, rows: Rows) -> tuple[str, ...]:
        return *super().reported(rows), *(f"mtp_acceptance_{depth}" for depth in range(1, 1 + self.num_depths))

    def losses(self, reports: Mapping[str, float], balance_loss: float, counts: Mapping[str, float]
               ) -> ValidationLosses:
        return ValidationLosses(reports, balance_loss, counts)


def mean_acceptance(batches: list[ValidationLosses]) -> tuple[float, ...]:
    """Return the acceptance of each depth over the drafts of all batches."""
    sums = [[accepted * labels for accepted, labels in zip(each.mtp_acceptance, each.mtp_labels)] for each in batches]
    return tuple(sum(of_depth) / (sum(labels) or 1.0)
                 for of_depth, labels in zip(zip(*sums), zip(*(each.mtp_labels for each in batches))))
