"""The objective of distillation: the divergence from a teacher, mixed with the labels' negative log-likelihood.

    loss = ratio * kd_loss (* temperature^2) + (1 - ratio) * lm_loss + lambda / D * sum of mtp_loss

kd_loss and lm_loss are weighted means over the labels of the global batch. MTP depths, for which a teacher says
nothing, are trained on their labels whatever the ratio.

A live teacher's logits are computed from its final states chunk by chunk beside the student's: neither's are ever there
for all tokens, nor for the whole vocabulary on a tensor-parallel rank.

Shapes: B rows, S tokens, T tokens of a chunk, H the teacher's hidden size, v this rank's part of the vocabulary, K ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_deepseek.fine_tuning_settings import DistillationSettings
from megatron_deepseek.finetuning.distillation.losses import divergence_of, divergence_of_top
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Rows
from megatron_deepseek.parallel.vocabulary_divergence import vocabulary_divergence
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.training.next_token import NextToken, NextTokenLosses

STATES = "teacher_states"  # the input of the teacher's head [B, S, H], of width 0 on ranks without a head
IDS, LOG_PROBABILITIES = "teacher_ids", "teacher_log_probabilities"  # of the K likeliest ids, [B, S, K]
REST = "teacher_log_rest"  # the log of what all other ids have, [B, S]


class TeacherHead(Protocol):
    """A live teacher's head: this rank's columns of its logits."""

    num_ids: int  # that both models know; rows of a head behind these are padding

    def logits(self, states_TH: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, v] of the columns that this rank has of the student's."""


@dataclass(frozen=True)
class DistillationLosses(NextTokenLosses):
    """The losses of a global batch: the mixture that is trained on, and the divergence, beside those of NextToken."""

    @property
    def objective(self) -> Mapping[str, float]:
        return {name: self.reports[name] for name in ("distill_loss", "kd_loss")}


class Distillation(NextToken):
    """The objective with one of two teachers: a live one's `head`, or without it the K likeliest ids of a cache, which
    knows the first `num_ids`.
    """

    def __init__(self, settings: DistillationSettings, head: TeacherHead | None = None, num_depths: int = 0,
                 mtp_scale: float = 0.0, num_ids: int = 0):
        super().__init__(num_depths, mtp_scale)
        assert (head is None) == (num_ids > 0), num_ids
        self.settings, self.head, self.num_ids, self.divergence = settings, head, num_ids, divergence_of(settings)
        self.inputs = (IDS, LOG_PROBABILITIES, REST) if head is None else (STATES,)

    def main(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        teacher = (rows.inputs[name] for name in self.inputs)
        read = self._with_cached if self.head is None else self._with_live
        divergence_BS, log_p_BS = predictions.for_chunks(read, rows.labels_BMS[:, 0], *teacher)
        kd_loss, lm_loss = self.mean(divergence_BS, rows, counts), self.mean(-log_p_BS, rows, counts)
        loss = _weighted(self.settings.factor, kd_loss) + _weighted(1 - self.settings.kd_ratio, lm_loss)
        return loss, {"distill_loss": loss, "kd_loss": kd_loss, "lm_loss": lm_loss,
                      **self.source_sums(-log_p_BS.detach(), rows)}

    def _with_live(self, logits: VocabularyLogits, labels_T: torch.Tensor, states_TH: torch.Tensor
                   ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divergence and log p(label) of some tokens, [T] each."""
        both = logits, VocabularyLogits(self.head.logits(states_TH), logits.tp)
        student, teacher = (each.of_first(self.head.num_ids).at_temperature(self.settings.kd_temperature)
                            for each in both)
        return vocabulary_divergence(student, teacher, self.divergence), logits.log_probabilities(labels_T)

    def _with_cached(self, logits: VocabularyLogits, labels_T: torch.Tensor, ids_TK: torch.Tensor,
                     log_q_TK: torch.Tensor, log_rest_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        student = logits.of_first(self.num_ids).at_temperature(self.settings.kd_temperature)
        divergence_T = divergence_of_top(student, ids_TK.long(), log_q_TK, log_rest_T, self.divergence)
        return divergence_T, logits.log_probabilities(labels_T)

    def reported(self, rows: Rows) -> tuple[str, ...]:
        return "distill_loss", "kd_loss", *super().reported(rows)

    def losses(self, reports: Mapping[str, float], balance_loss: float, counts: Mapping[str, float]
               ) -> DistillationLosses:
        return DistillationLosses(reports, balance_loss, counts)


def _weighted(weight: float, loss: torch.Tensor) -> torch.Tensor:
    """Return weight * loss; without a weight no gradient is computed."""
    return weight * loss if weight else 0.0 * loss.detach()
