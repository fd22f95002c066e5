"""The report of held-out preference data: the objective's loss, and rewards, of each set."""

from collections.abc import Callable, Sequence

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.finetuning.held_out import EvaluationSet
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.objective import Losses
from megatron_deepseek.training.trainer import Trainer


class PreferenceEvaluation:
    """Evaluates all sets between steps. Means are over the pairs of a whole set, or over its good or bad answers; KTO's
    z is that of each batch.
    """

    def __init__(self, settings: Settings, sets: Sequence[EvaluationSet],
                 complete: Callable[[Trainer, Batch], Batch] | None):
        self.settings, self.sets, self.complete = settings, tuple(sets), complete

    def __call__(self, trainer: Trainer, report: Report, iteration: int) -> None:
        for each in self.sets:
            report.held_out(iteration, each.name, self.evaluate(trainer, each))

    def evaluate(self, trainer: Trainer, evaluation_set: EvaluationSet) -> dict[str, float]:
        """Return the means over a set by name, the loss as "loss". All ranks call this."""
        batch, found = self.settings.batch, []
        for number in range(evaluation_set.num_batches):
            rows = evaluation_set.sampler.batch(number * batch.global_batch_size, batch.global_batch_size,
                                                batch.micro_batch_size, trainer.meshes.rank("dp"),
                                                self.settings.layout.dp).to(trainer.meshes.device)
            rows = rows if self.complete is None else self.complete(trainer, rows)
            found.append(trainer.evaluate(rows))
        return means_over_batches(found)


def means_over_batches(losses: Sequence[Losses]) -> dict[str, float]:
    """Return the means over all batches, each by the number that it was divided by, and how many samples there were."""
    (trained, _), *_ = losses[0].objective.items()
    means = {"loss" if name == trained else name: _mean(name, losses) for name in losses[0].objective}
    return {**means, "samples": sum(each.num_labels for each in losses)}


def _mean(name: str, losses: Sequence[Losses]) -> float:
    counted = {"rewards_chosen": "good", "logps_chosen": "good", "rewards_rejected": "bad", "logps_rejected": "bad"}
    count = counted.get(name) if "good" in losses[0].counts else None
    weights = [each.counts[count or "samples"] for each in losses]
    return sum(each.reports[name] * weight for each, weight in zip(losses, weights)) / (sum(weights) or 1.0)
