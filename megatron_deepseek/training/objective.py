"""The objective that a model is trained for: the one place where a task adds its loss, whatever the layout.

A step asks an objective twice. `counts` is asked once, before the first forward, on this data rank's whole rows: what
it counts is summed over all data ranks, so that every loss is a sum divided by numbers of the global batch.
`contribution` is asked for every micro-batch, on the ranks that hold the output head, with this context rank's part of
the rows: what it returns is added up over micro-batches and ranks. So an objective never averages over what happens to
be on a rank, and knows no layout. docs/objectives.md has the rules and an example.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows


@dataclass(frozen=True)
class Losses:
    """The losses that an objective reports of a global batch, by name, and the numbers that it counted.

    `balance_loss` is the model's own, already weighted; no other loss includes it.
    """

    reports: Mapping[str, float] = field(default_factory=dict)
    balance_loss: float = 0.0
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def lm_loss(self) -> float | None:
        """Return the mean negative log-likelihood of labels, None if that is not reported."""
        return self.reports.get("lm_loss")

    @property
    def mtp_loss(self) -> tuple[float, ...]:
        """Return the loss of each MTP depth."""
        return ()

    @property
    def sources(self) -> Sequence:
        """Return the sums of each dataset of a blend, none where they are not told apart."""
        return ()

    @property
    def objective(self) -> Mapping[str, float]:
        """Return what is reported beside lm_loss and mtp_loss, by its names in metrics.jsonl. Where there is any, the
        first is the loss that is trained on, which else is lm_loss.
        """
        return {}

    @property
    def trained(self) -> tuple[str, float]:
        """Return the name and the value of the loss that is trained on."""
        return next(iter(self.objective.items()), ("lm_loss", self.lm_loss))

    @property
    def num_labels(self) -> int:
        """Return how many terms the loss that is trained on is a mean of, 0 for a batch that teaches nothing."""
        return round(self.counts["labels"])

    def finite(self) -> bool:
        """Return whether every loss is finite; a step with one that is not makes no update."""
        return all(map(math.isfinite, (*self.reports.values(), self.balance_loss)))


class Objective(ABC):
    """A task's loss, as counts and contributions.

    `inputs` names the entries of `Rows.inputs` that it reads, which a batch must have. `rows_together`: so many
    successive rows belong together (2 for pairs), and micro-batches are a multiple of that. `num_depths`: how many MTP
    depths predict; MTP modules after those are neither run nor trained.
    """

    inputs: tuple[str, ...] = ()
    rows_together: int = 1
    num_depths: int = 0

    @abstractmethod
    def counts(self, rows: Rows) -> Mapping[str, float | torch.Tensor]:
        """Return numbers to divide by, as sums over these rows; the same names on every rank."""

    @abstractmethod
    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        """Return what this micro-batch adds to the loss on this rank. `counts` are sums over the global batch.

        Terms of single tokens [B, S] are summed as they are. Terms made of a sum along rows (`rows.per_row`,
        `rows.per_document`) are the same on all context ranks, and `rows.share` takes this one's part of their sum.
        """

    @abstractmethod
    def reported(self, rows: Rows) -> tuple[str, ...]:
        """Return the names that `contribution` reports, the same for every micro-batch and rank."""

    def losses(self, reports: Mapping[str, float], balance_loss: float, counts: Mapping[str, float]) -> Losses:
        """Return the losses that a step reports, of `reports` summed over the global batch."""
        return Losses(reports, balance_loss, counts)
