"""Objectives beside the next token: fine-tuning's mean over samples and DPO's, nonlinear in sums along rows or
documents, and one that reads logits.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from megatron_deepseek.finetuning.objectives import HeldOut, SampleMean
from megatron_deepseek.model.noise import BOUNDS, KEYS
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.training.acceptance import Validation
from megatron_deepseek.training.objective import Objective

REFERENCE = "reference_log_probabilities"
TEACHER_IDS, TEACHER_LOG_PROBABILITIES = "teacher_ids", "teacher_log_probabilities"
BETA = 0.7
ENTROPY_SCALE = 0.2


class PairedSigmoid(Objective):
    """DPO's loss (arXiv 2305.18290): pairs are rows 2i, preferred, and 2i + 1; of packed rows, neighbouring documents.

    The reference model's log-probabilities come with the batch.
    """

    inputs = (REFERENCE,)
    rows_together = 2

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        return {"pairs": self._pairs(rows, rows.weights_BS)[1].sum()}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        ratio_BS = (predictions.log_probabilities() - rows.inputs[REFERENCE]) * rows.weights_BS
        ratios_P2, exists_P = self._pairs(rows, ratio_BS)
        margin_P = BETA * (ratios_P2[:, 0] - ratios_P2[:, 1])
        loss = rows.share(-F.logsigmoid(margin_P) * exists_P) / (counts["pairs"] or 1.0)
        accuracy = rows.share((margin_P > 0).double() * exists_P) / (counts["pairs"] or 1.0)
        return Contribution(loss, {"dpo_loss": loss, "accuracy": accuracy})

    def reported(self, rows: Rows) -> tuple[str, ...]:
        return "dpo_loss", "accuracy"

    def _pairs(self, rows: Rows, x_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of x [P, 2] over the two of each pair, and which pairs there are: of documents, both must exist."""
        if rows.sums.documents is None:
            sums_P2 = rows.per_row(x_BS).view(-1, 2)
            return sums_P2, torch.ones_like(sums_P2[:, 0])
        sums_BD, exists_BD = rows.per_document(x_BS), rows.per_document(torch.ones_like(x_BS)) > 0
        odd = sums_BD.shape[1] % 2
        sums_P2, exists_P2 = (F.pad(x, (0, odd)).reshape(-1, 2) for x in (sums_BD, exists_BD))
        return sums_P2, exists_P2.all(1)


def objective_of(kind: str, mtp_depth: int) -> Objective | None:
    """None for pre-training's own."""
    return {"next_token": lambda: None, "samples": lambda: SampleMean(mtp_depth, 0.5 * mtp_depth),
            "pairs": PairedSigmoid, "distillation": Distillation}[kind]()


def held_out_of(kind: str, mtp_depth: int) -> Objective | None:
    """What an evaluation reports; None for the losses that are trained on."""
    held_out = {"samples": HeldOut, "next_token": Validation}
    return held_out[kind](mtp_depth) if kind in held_out else None


def reference_log_probabilities(size: int, step: int, length: int) -> torch.Tensor:
    """[size, length] float64, of about a random model's size."""
    generator = torch.Generator().manual_seed(300 + step)
    return -4 * torch.rand(size, length, dtype=torch.float64, generator=generator)


class Distillation(Objective):
    """Of each token that counts the divergence from a teacher's K likeliest ids, less a part of the entropy.

    sum over the teacher's ids of q (log q - log p): the rest of its distribution is not known.
    """

    inputs = (TEACHER_IDS, TEACHER_LOG_PROBABILITIES)

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        return {"tokens": (rows.weights_BS > 0).sum()}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        teacher = rows.inputs[TEACHER_IDS], rows.inputs[TEACHER_LOG_PROBABILITIES]
        divergence_BS = predictions.for_chunks(self._divergence, *teacher)
        entropy_BS = predictions.entropy()
        divergence, entropy = ((x_BS * rows.weights_BS).sum() / (counts["tokens"] or 1.0)
                               for x_BS in (divergence_BS, entropy_BS))
        return Contribution(divergence - ENTROPY_SCALE * entropy, {"divergence": divergence, "entropy": entropy})

    def reported(self, rows: Rows) -> tuple[str, ...]:
        return "divergence", "entropy"

    @staticmethod
    def _divergence(logits: VocabularyLogits, ids_TK: torch.Tensor, teacher_TK: torch.Tensor) -> torch.Tensor:
        return (teacher_TK.exp() * (teacher_TK - logits.log_probabilities(ids_TK))).sum(-1)


def inputs_of(kind: str, size: int, step: int, length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """What an objective's batch has of each token beyond the others, made of the step alone."""
    if kind == "pairs":
        return {REFERENCE: reference_log_probabilities(size, step, length)}
    if kind == "samples":  # NEFTune's noise, of some tokens
        generator = torch.Generator().manual_seed(500 + step)
        keys_BS = torch.randint(-2**63, 2**63 - 1, (size, length), generator=generator)
        return {KEYS: keys_BS, BOUNDS: torch.rand(size, length, generator=generator).double().round(decimals=1)}
    if kind == "distillation":
        generator = torch.Generator().manual_seed(400 + step)
        logits_BSV = 2 * torch.randn(size, length, vocab_size, dtype=torch.float64, generator=generator)
        values_BSK, ids_BSK = logits_BSV.log_softmax(-1).topk(3)
        return {TEACHER_IDS: ids_BSK, TEACHER_LOG_PROBABILITIES: values_BSK}
    return {}
