"""The objectives of preference tuning, over the documents of packed rows: pairs, and KTO's labelled answers.

A pair is two neighbouring documents of a row, chosen and rejected. All that a loss needs of an answer is a sum over its
tokens, so a reference is given as the document's sum, on the document's first token (inputs.py). Sums are float64.

MTP modules are neither run nor trained: the papers' losses are of the model's own predictions.

Shapes: B rows, S tokens, D documents of a row, P pairs of a row, 2 sides of a pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_deepseek.finetuning.preference.losses import PAIR_LOSSES, PairScores, kto, rewards
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows
from megatron_deepseek.fine_tuning_settings import PreferenceSettings
from megatron_deepseek.training.objective import Losses, Objective

REFERENCE = "reference_log_probabilities"  # a document's sum, on its first token
VALUES = "document_values"  # its label or margin, there too
LAST = "last_tokens"  # 1 on a document's last token, 0 on all others
DIVERGENCE = "kl_divergence"  # KTO's z of the global batch, on every row


@dataclass(frozen=True)
class PreferenceLosses(Losses):
    """The losses and rewards of a global batch, means over its pairs, or over its good and its bad answers."""

    @property
    def objective(self) -> Mapping[str, float]:
        return {name: value for name, value in self.reports.items() if name != "lm_loss"}

    @property
    def num_labels(self) -> int:
        """Return how many pairs, or answers, the batch has."""
        return round(self.counts["samples"])


class PreferenceObjective(Objective):
    """What the objectives have in common: the settings, and the losses that are reported."""

    def __init__(self, settings: PreferenceSettings):
        self.settings = settings
        self.inputs = ((REFERENCE,) if settings.has_reference else ()) + self.more_inputs

    more_inputs: tuple[str, ...] = ()
    more_reports: tuple[str, ...] = ()

    def reported(self, rows: Rows) -> tuple[str, ...]:
        return (f"{self.settings.objective}_loss", *self.more_reports)

    def losses(self, reports: Mapping[str, float], balance_loss: float, counts: Mapping[str, float]
               ) -> PreferenceLosses:
        return PreferenceLosses(reports, balance_loss, counts)

    def reference_sums(self, rows: Rows, like_BD: torch.Tensor) -> torch.Tensor:
        """Return the reference's sum of each document, [B, D] float64, zeros without a reference."""
        if not self.settings.has_reference:
            return torch.zeros_like(like_BD)
        return rows.per_document(rows.inputs[REFERENCE].double())


def sides_of(x_BD: torch.Tensor) -> torch.Tensor:
    """Return what two neighbouring documents have, [B, P, 2]; padding behind the last one makes up the number."""
    return F.pad(x_BD, (0, x_BD.shape[1] % 2)).unflatten(1, (-1, 2))


def there_are(lengths_BP2: torch.Tensor) -> torch.Tensor:
    """Return which pairs there are, [B, P]: those with tokens that count on both sides."""
    return (lengths_BP2 > 0).all(-1)


class Pairs(PreferenceObjective):
    """DPO and its kin: the mean over pairs, and the mean negative log-likelihood of the chosen answers' tokens.

    The latter is reported as lm_loss, and counts with the factor --rpo-alpha, in ORPO with 1.
    """

    more_reports = ("lm_loss", "rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy",
                    "logps_chosen", "logps_rejected")

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        lengths_BP2 = sides_of(rows.per_document(rows.weights_BS.double()))
        there_BP = there_are(lengths_BP2)
        return {"samples": there_BP.sum(), "chosen_weight": (lengths_BP2[..., 0] * there_BP).sum()}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        weights_BS = rows.weights_BS.double()
        sums_BD = rows.per_document(predictions.log_probabilities().double() * weights_BS)
        lengths_BP2 = sides_of(rows.per_document(weights_BS))
        there_BP = there_are(lengths_BP2)
        scores = PairScores(*(_or_dummies(each, there_BP) for each in (
            sides_of(sums_BD), sides_of(self.reference_sums(rows, sums_BD)), lengths_BP2)))
        mean = _Mean(rows, there_BP, counts["samples"])
        loss = mean(PAIR_LOSSES[self.settings.objective](scores, self.settings))
        likelihood = rows.share(-scores.policy_P2[..., 0] * there_BP) / (counts["chosen_weight"] or 1.0)
        reports = {f"{self.settings.objective}_loss": loss, "lm_loss": likelihood, **self._rewards(scores, mean)}
        return Contribution(loss + self.settings.likelihood_factor * likelihood, reports)

    def _rewards(self, scores: PairScores, mean: "_Mean") -> dict[str, torch.Tensor]:
        rewards_BP2, policy_BP2 = rewards(scores, self.settings).detach(), scores.policy_P2.detach()
        margin_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
        return {"rewards_chosen": mean(rewards_BP2[..., 0]), "rewards_rejected": mean(rewards_BP2[..., 1]),
                "rewards_margin": mean(margin_BP), "rewards_accuracy": mean((margin_BP > 0).double()),
                "logps_chosen": mean(policy_BP2[..., 0]), "logps_rejected": mean(policy_BP2[..., 1])}


@dataclass(frozen=True)
class _Mean:
    """This rank's part of means over the pairs of the global batch, `number` of them, of terms [B, P]."""

    rows: Rows
    there_BP: torch.Tensor
    number: float

    def __call__(self, x_BP: torch.Tensor) -> torch.Tensor:
        return self.rows.share(x_BP * self.there_BP) / (self.number or 1.0)


def _or_dummies(x_BP2: torch.Tensor, there_BP: torch.Tensor) -> torch.Tensor:
    """Return x with 1 where there is no pair, so that no loss is infinite there, and 0 times it not a number."""
    return torch.where(there_BP.unsqueeze(-1), x_BP2, torch.ones_like(x_BP2))


class LabelledAnswers(PreferenceObjective):
    """KTO: the mean over good and bad answers, each with its weight. z is that of the global batch (divergence.py)."""

    more_inputs = (VALUES, DIVERGENCE)
    more_reports = ("rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected", "kl")

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        there_BD = rows.per_document(rows.weights_BS.double()) > 0
        good_BD = rows.per_document(rows.inputs[VALUES].double()) > 0
        return {"samples": there_BD.sum(), "good": (there_BD & good_BD).sum(), "bad": (there_BD & ~good_BD).sum()}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        weights_BS = rows.weights_BS.double()
        sums_BD = rows.per_document(predictions.log_probabilities().double() * weights_BS)
        there_BD = rows.per_document(weights_BS) > 0
        signs_BD = rows.per_document(rows.inputs[VALUES].double())
        ratios_BD = sums_BD - self.reference_sums(rows, sums_BD)
        z_B1 = rows.inputs[DIVERGENCE].double().unsqueeze(1)
        samples = counts["samples"] or 1.0
        loss = rows.share(kto(ratios_BD, signs_BD, z_B1, self.settings) * there_BD) / samples
        reports = {"kto_loss": loss, "kl": rows.share(z_B1 * there_BD) / samples}
        for side, chosen_BD in (("chosen", there_BD & (signs_BD > 0)), ("rejected", there_BD & (signs_BD < 0))):
            number = counts["good" if side == "chosen" else "bad"] or 1.0
            reports[f"rewards_{side}"] = rows.share(self.settings.beta * ratios_BD.detach() * chosen_BD) / number
            reports[f"logps_{side}"] = rows.share(sums_BD.detach() * chosen_BD) / number
        return Contribution(loss, reports)


class Rewards(PreferenceObjective):
    """A reward model (arXiv 2203.02155, section 3.5): Bradley-Terry's loss of the scores at both answers' last tokens.

    The score of the chosen answer is to exceed the other's, where the row has a margin by that much.
    """

    more_inputs = (VALUES, LAST)
    more_reports = ("rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy")

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        return {"samples": there_are(sides_of(rows.per_document(rows.weights_BS.double()))).sum()}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        there_BP = there_are(sides_of(rows.per_document(rows.weights_BS.double())))
        scores_BP2 = sides_of(rows.per_document(predictions.scores().double() * rows.inputs[LAST]))
        asked_BP2 = sides_of(rows.per_document(rows.inputs[VALUES].double()))
        margin_BP = scores_BP2[..., 0] - scores_BP2[..., 1]
        mean = _Mean(rows, there_BP, counts["samples"])
        loss = mean(-F.logsigmoid(margin_BP - asked_BP2[..., 0]))
        if self.settings.center_rewards_coefficient:
            loss = loss + self.settings.center_rewards_coefficient * mean(scores_BP2.sum(-1)**2)
        reports = {"rewards_chosen": scores_BP2[..., 0], "rewards_rejected": scores_BP2[..., 1],
                   "rewards_margin": margin_BP, "rewards_accuracy": (margin_BP > 0).double()}
        return Contribution(loss, {"reward_loss": loss} | {name: mean(x.detach()) for name, x in reports.items()})


def preference_objective(settings: PreferenceSettings) -> PreferenceObjective:
    """Return the objective of --objective."""
    return {"kto": LabelledAnswers, "reward": Rewards}.get(settings.objective, Pairs)(settings)
