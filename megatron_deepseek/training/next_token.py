"""Pre-training's objective: the next token, and with MTP those after it (arXiv 2412.19437, section 2.2).

    loss = lm_loss + lambda / D * sum over depths k = 1 .. D of mtp_loss_k

Each loss is the weighted mean over the labels of its own depth in the global batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows
from megatron_deepseek.training.objective import Losses, Objective


class SourceSum(NamedTuple):
    """The sums of one dataset of a blend: its weighted main losses, the weights, and how many labels have a weight."""

    loss: float
    weight: float
    labels: int


@dataclass(frozen=True)
class NextTokenLosses(Losses):
    """The mean losses of a global batch, by the names that metrics.jsonl has. Without any label they are 0."""

    @property
    def lm_loss(self) -> float:
        return self.reports["lm_loss"]

    @property
    def mtp_loss(self) -> tuple[float, ...]:
        """Return the loss of each MTP depth."""
        depths = sum(name.startswith("mtp_loss_") for name in self.reports)
        return tuple(self.reports[f"mtp_loss_{depth}"] for depth in range(1, depths + 1))

    @property
    def num_labels(self) -> int:
        """Return how many labels of the main prediction have a weight."""
        return round(self.counts["labels"])

    @property
    def sources(self) -> tuple[SourceSum, ...]:
        """Return the sums of each dataset of a blend."""
        number = sum(name.startswith("source_loss_") for name in self.reports)
        return tuple(SourceSum(self.reports[f"source_loss_{k}"], self.counts[f"source_weight_{k}"],
                               round(self.counts[f"source_labels_{k}"])) for k in range(number))


class NextToken(Objective):
    """The objective of pre-training. `mtp_scale` is the report's lambda; `num_depths` its D."""

    def __init__(self, num_depths: int = 0, mtp_scale: float = 0.0):
        self.num_depths, self.mtp_scale = num_depths, mtp_scale

    def counts(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        weights_M = rows.weights_BMS.double().sum((0, 2))
        counts = {f"weight_{depth}": weight for depth, weight in enumerate(weights_M)}
        counts["labels"] = (rows.weights_BS != 0).sum()
        if rows.sources_BK is not None:
            weights_K = rows.sources_BK.double().T @ rows.weights_BS.double().sum(1)
            labels_K = rows.sources_BK.double().T @ (rows.weights_BS != 0).double().sum(1)
            counts |= {f"source_weight_{k}": weight for k, weight in enumerate(weights_K)}
            counts |= {f"source_labels_{k}": labels for k, labels in enumerate(labels_K)}
        return counts

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        total, reports = self.main(predictions, rows, counts)
        for depth in range(1, 1 + predictions.num_depths):
            loss = self.mean(-predictions.log_probabilities(depth), rows, counts, depth)
            reports[f"mtp_loss_{depth}"] = loss
            total = total + loss * self.mtp_scale / predictions.num_depths
        return Contribution(total, reports)

    def main(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what the main prediction adds to the loss, and to the reports."""
        loss_BS = -predictions.log_probabilities()
        loss = self.mean(loss_BS, rows, counts)
        return loss, {"lm_loss": loss, **self.source_sums(loss_BS.detach(), rows)}

    def mean(self, x_BS: torch.Tensor, rows: Rows, counts: Mapping[str, float], depth: int = 0) -> torch.Tensor:
        """Return this rank's part of the weighted mean over the labels of a depth."""
        return (x_BS * rows.weights_BMS[:, depth]).sum() / (counts[f"weight_{depth}"] or 1.0)

    def reported(self, rows: Rows) -> tuple[str, ...]:
        sources = 0 if rows.sources_BK is None else rows.sources_BK.shape[1]
        return ("lm_loss", *(f"mtp_loss_{depth}" for depth in range(1, 1 + self.num_depths)),
                *(f"source_loss_{k}" for k in range(sources)))

    def losses(self, reports: Mapping[str, float], balance_loss: float, counts: Mapping[str, float]
               ) -> NextTokenLosses:
        return NextTokenLosses(reports, balance_loss, counts)

    def source_sums(self, loss_BS: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
        """Return the sum of main token losses of each dataset; not the mean, since a dataset may have no label."""
        if rows.sources_BK is None:
            return {}
        sums_K = rows.sources_BK.double().T @ (loss_BS * rows.weights_BS).double().sum(1)
        return {f"source_loss_{k}": loss for k, loss in enumerate(sums_K)}


def by_source(names: Sequence[str], sums: Sequence[SourceSum]) -> tuple[dict, dict] | tuple[None, None]:
    """Return (mean loss, number of labels) by name, without datasets that had no label. None and None for no names."""
    if not names:
        return None, None
    seen = [(name, each) for name, each in zip(names, sums, strict=True) if each.labels]
    return {name: each.loss / each.weight for name, each in seen}, {name: each.labels for name, each in seen}
