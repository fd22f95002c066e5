"""What the stages of a model are given in a step: a micro-batch for each forward, and what all micro-batches share.

Shapes: B rows, S tokens of each on this context rank, M = 1 + MTP depth predictions of each token, K datasets, E
experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_deepseek.model.attention.mask import CausalMask
from megatron_deepseek.model.moe import RouterStats
from megatron_deepseek.model.noise import EmbeddingNoise
from megatron_deepseek.model.positions import Replay, TokenKeys
from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.parallel.sequence_sums import SequenceSums


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that an objective sees: when it counts, all rows of a data rank, undivided; when it computes its
    contribution, a micro-batch's part on this context rank.

    labels_BMS and weights_BMS are for the main prediction and each MTP depth. `inputs` are those that the objective
    asked for, [B, S, ...] by token or [B, ...] by row. sources_BK says which dataset a row is from, None for a single
    one.
    """

    labels_BMS: torch.Tensor
    weights_BMS: torch.Tensor
    sums: SequenceSums = SequenceSums()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sources_BK: torch.Tensor | None = None

    @property
    def weights_BS(self) -> torch.Tensor:
        """Return the weight of each label of the main prediction."""
        return self.weights_BMS[:, 0]

    def per_row(self, x_BS: torch.Tensor) -> torch.Tensor:
        """Return the sum of each row over all its tokens, [B], on whichever ranks they are."""
        return self.sums.per_row(x_BS)

    def per_document(self, x_BS: torch.Tensor) -> torch.Tensor:
        """Return the sum of each document over all its tokens, [B, D]; rows are one document where none are given."""
        return self.sums.per_document(x_BS)

    def of_documents(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Return what x has of each token's document, [B, S]; [B, 1] where rows are one document."""
        return self.sums.of_documents(x_BD)

    def later(self, x_BS: torch.Tensor, by: int) -> torch.Tensor:
        """Return what x has `by` tokens later in its row, on whichever rank that token is; 0 behind the end."""
        return self.sums.later(x_BS, by)

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the sum of terms [B] or [B, D] that were computed from sums along the rows."""
        return self.sums.share(x)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One micro-batch on this context rank.

    `routed_BMS`: which positions go to routed experts (`shifts.routed_tokens`), None for all. `mask`: what each token
    sees, the same for every layer. `noise`: what is added to the embeddings, None for nothing.
    `keys`: what adapters' dropout knows the tokens by; without any, nothing is dropped. `replay`: the experts that were
    chosen for them; without any, routers choose.
    """

    rows: Rows
    routed_BMS: torch.Tensor | None = None
    mask: CausalMask = CausalMask()
    noise: EmbeddingNoise | None = None
    keys: TokenKeys = TokenKeys()
    replay: Replay = Replay()


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one micro-batch adds on this rank to the loss, and to the reports: a scalar, and a scalar for each name.

    The sums of these over micro-batches and ranks are the numbers of the global batch.
    """

    loss: torch.Tensor
    reports: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class StepStatistics:
    """What a step's forwards report on this rank, added up over its micro-batches.

    `reports`: an objective's, by name; `expert_counts`: by layer name, of tokens whose experts were not given;
    `copies`: those of tokens that experts were to get; `dropped`: those of them above experts' capacity;
    `cross_node_sends`: how often a token was sent to another node; `chosen`: if asked for, the experts that each
    micro-batch's tokens have [B, own S, K], by layer name.
    """

    reports: dict[str, torch.Tensor] = field(default_factory=dict)
    balance_loss: torch.Tensor | float = 0.0
    expert_counts: dict[str, torch.Tensor] = field(default_factory=dict)
    copies: torch.Tensor | int = 0
    dropped: torch.Tensor | int = 0
    cross_node_sends: int = 0
    chosen: dict[str, list[torch.Tensor]] | None = None

    def add_reports(self, reports: Mapping[str, torch.Tensor]) -> None:
        for name, value in reports.items():
            self.reports[name] = self.reports.get(name, 0) + value.detach()

    def add_stats(self, layer: str, stats: RouterStats | None) -> None:
        if stats is None:
            return
        self.balance_loss = self.balance_loss + stats.balance_loss
        self.cross_node_sends = self.cross_node_sends + stats.cross_node_sends
        self.copies = self.copies + stats.copies
        self.dropped = self.dropped + stats.dropped
        self.expert_counts[layer] = self.expert_counts.get(layer, 0) + stats.counts_E
        if self.chosen is not None:
            self.chosen.setdefault(layer, []).append(stats.experts_BSK)


@dataclass(frozen=True, eq=False)
class StepContext:
    """What every micro-batch of a step shares.

    `num_sequences` is that of the global batch without blank rows, by which balance losses are divided. `contribution`
    computes what a micro-batch's predictions and rows add to the loss; None where only states are asked for.
    """

    num_sequences: int
    contribution: Callable[[Predictions, Rows], Contribution] | None = None
    statistics: StepStatistics = field(default_factory=StepStatistics)
