"""The report of held-out conversations: loss, perplexity and token accuracy of each set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.finetuning.objectives import HeldOut, HeldOutLosses
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.acceptance import mean_acceptance
from megatron_deepseek.training.trainer import Trainer


@dataclass(frozen=True)
class EvaluationSet:
    """One of --eval-dataset: its name, and the batches that are read of it."""

    name: str
    sampler: Sampler
    num_batches: int


@dataclass(frozen=True)
class HeldOutReport:
    """The means over the tokens with loss of a set. `mtp_loss` and `mtp_acceptance` have an entry for each depth."""

    loss: float
    token_accuracy: float
    mtp_loss: tuple[float, ...]
    mtp_acceptance: tuple[float, ...]
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class Evaluation:
    """Evaluates all sets between steps, and reports each."""

    def __init__(self, settings: Settings, sets: Sequence[EvaluationSet]):
        self.settings, self.sets = settings, tuple(sets)

    def __call__(self, trainer: Trainer, report: Report, iteration: int) -> None:
        for each in self.sets:
            found = self.evaluate(trainer, each)
            report.held_out(iteration, each.name, {"loss": found.loss, "perplexity": found.perplexity,
                                                   "token_accuracy": found.token_accuracy,
                                                   "mtp_loss": found.mtp_loss,
                                                   "mtp_acceptance": found.mtp_acceptance, "tokens": found.tokens})

    def evaluate(self, trainer: Trainer, evaluation_set: EvaluationSet) -> HeldOutReport:
        """Return the means over all tokens of a set, which don't depend on its batches. All ranks call this."""
        batch, objective = self.settings.batch, HeldOut(trainer.objective.num_depths)
        batches = evaluation_set.sampler.evaluation(
            evaluation_set.num_batches, batch.global_batch_size, batch.micro_batch_size, trainer.meshes.rank("dp"),
            self.settings.layout.dp)
        return together([trainer.evaluate(each.to(trainer.meshes.device), objective) for each in batches])


def together(losses: Sequence[HeldOutLosses]) -> HeldOutReport:
    """Return the means over the tokens of all batches, each loss by the weights that it was divided by."""
    def mean(name: str, depth: int) -> float:
        weights = [each.counts[f"weight_{depth}"] for each in losses]
        return sum(each.reports[name] * weight for each, weight in zip(losses, weights)) / (sum(weights) or 1.0)

    depths = range(1, 1 + len(losses[0].mtp_loss))
    labels = sum(each.num_labels for each in losses)
    return HeldOutReport(mean("lm_loss", 0), sum(each.correct for each in losses) / (labels or 1),
                         tuple(mean(f"mtp_loss_{depth}", depth) for depth in depths), mean_acceptance(losses), labels)
