"""Scores of given tokens, forward only: the log-probabilities of training's losses, in the order of the batch.

Shapes: B rows of this data rank, S tokens of a whole sequence, K experts of a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_deepseek.model.predictions import Predictions
from megatron_deepseek.model.step import Contribution, Rows
from megatron_deepseek.parallel.collectives import all_gather
from megatron_deepseek.parallel.context import zigzag
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.vocabulary_logits import VocabularyLogits
from megatron_deepseek.training.objective import Objective


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of a batch, the same on every rank that has these rows, whatever pipeline stage it holds.

    log_probabilities_BS: log p(label) of each token, at least float32. `likeliest_BS`, where it was asked for: whether
    the label is the likeliest there. `experts`, where they were asked for: by layer ("model.layers.3.mlp") which
    experts each token chose, int64 [B, S, K] in no particular order, -1 for padding.
    """

    log_probabilities_BS: torch.Tensor
    likeliest_BS: torch.Tensor | None = None
    experts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Keep(Objective):
    """An objective without a loss, which keeps what `read` takes of each micro-batch in `kept`, in their order."""

    def __init__(self, read: Callable[[Predictions, Rows], torch.Tensor]):
        self.read, self.kept = read, []

    def counts(self, rows: Rows) -> Mapping[str, float]:
        return {}

    def contribution(self, predictions: Predictions, rows: Rows, counts: Mapping[str, float]) -> Contribution:
        read_BS = self.read(predictions, rows)
        self.kept.append(read_BS)
        return Contribution(read_BS.new_zeros(()))

    def reported(self, rows: Rows) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Distribution:
    """The distribution whose log-probabilities are read: the softmax of logits / temperature, among the ids that a
    batch's input `kept_ids` has for a token, where it is named: VocabularyLogits.log_probabilities_among.
    """

    temperature: float = 1.0
    kept_ids: str | None = None

    def log_probabilities(self, predictions: Predictions, rows: Rows) -> torch.Tensor:
        kept_BSM = None if self.kept_ids is None else rows.inputs[self.kept_ids]
        return predictions.log_probabilities(temperature=self.temperature, kept_BSM=kept_BSM)

    def log_probabilities_and_likeliest(self, predictions: Predictions, rows: Rows) -> torch.Tensor:
        """Return log p(label) of each token and, as 0 or 1, whether the label is the likeliest, [B, S, 2]."""
        found_BS = self.log_probabilities(predictions, rows)
        right_BS = likeliest(predictions, rows) == predictions.labels_BMS[:, 0]
        return torch.stack([found_BS, right_BS.to(found_BS.dtype)], -1)


def likeliest(predictions: Predictions, rows: Rows) -> torch.Tensor:
    return predictions.for_chunks(VocabularyLogits.likeliest)


def whole_sequences(own: torch.Tensor, meshes: Meshes) -> torch.Tensor:
    """Gather all positions, [B, S, ...], of which each context rank has its own along dimension 1."""
    size = meshes.layout.cp
    if size == 1:
        return own
    gathered = all_gather(own, 1, meshes.group("cp"))
    order_S = torch.cat([zigzag(gathered.shape[1], rank, size) for rank in range(size)])
    return gathered.index_select(1, order_S.argsort().to(own.device))


def from_stage(own: torch.Tensor | None, like: torch.Tensor, holder: int, meshes: Meshes) -> torch.Tensor:
    """Broadcast the tensor of pipeline rank `holder` to all; `like` has its shape, dtype and device."""
    if meshes.layout.pp == 1:
        return own
    result = torch.empty_like(like) if own is None else own.contiguous()
    group = meshes.group("pp")
    dist.broadcast(result, group=group, group_src=holder)
    return result


def chosen_experts(chosen: Mapping[str, Sequence[torch.Tensor]], like_BSK: torch.Tensor, holders: Mapping[str, int],
                   meshes: Meshes) -> dict[str, torch.Tensor]:
    """Return which experts the tokens chose in every layer, on every rank.

    `chosen`: by layer of this rank, the choices of each micro-batch's tokens on this tensor-parallel rank. `holders`:
    the pipeline rank of each layer of the model, in the same order on all ranks.
    """
    found = {}
    for layer, holder in holders.items():
        own = None
        if layer in chosen:
            own = torch.cat(list(chosen[layer]))
            own = own if meshes.layout.tp == 1 else all_gather(own, 1, meshes.group("tp"))
            own = whole_sequences(own, meshes)
        found[layer] = from_stage(own, like_BSK, holder, meshes)
    return found
