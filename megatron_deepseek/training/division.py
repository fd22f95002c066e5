"""The division of a batch: from whole sequences to the micro-batches of one context rank.

Shapes: B rows, S tokens of a sequence, M predictions of each token.
"""

from dataclasses import dataclass, replace

import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.model.attention.mask import CausalMask
from megatron_deepseek.model.noise import EmbeddingNoise
from megatron_deepseek.model.positions import REPLAYED, TOKEN_KEYS, Replay, TokenKeys
from megatron_deepseek.model.shifts import routed_tokens, shifted_labels
from megatron_deepseek.model.step import MicroBatch, Rows
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.sequence_sums import SequenceSums
from megatron_deepseek.parallel.stage import MicroBatches
from megatron_deepseek.training.objective import Objective


@dataclass(frozen=True, eq=False)
class Division:
    """A divided batch. `rows` are whole, for an objective to count; `tokens_BS` and `micro_batches` are this context
    rank's part, for the stages. The boundaries of documents have been found once, for all layers. `num_sequences`: of
    the rows that are no padding, so that blank ones, of which some layouts need more, change no loss.
    """

    rows: Rows
    tokens_BS: torch.Tensor
    micro_batches: MicroBatches
    num_sequences: int | torch.Tensor


def divide(batch: Batch, objective: Objective, cp: ContextParallel, micro_batch_size: int, routes: bool) -> Division:
    """Return `batch` as the stages take it. `routes`: whether the model has routed experts.

    Raise ValueError for a batch that lacks what the objective reads, for a micro-batch that would separate rows
    that belong together, and for a document that stands in two places of a row, of which a context rank might see one.
    """
    _check(batch, objective, micro_batch_size)
    labels_BMS, weights_BMS = shifted_labels(batch.labels_BS, batch.weights_BS, objective.num_depths,
                                             batch.documents_BS)
    documents = None if batch.documents_BS is None else Documents.find(batch.documents_BS)
    rows = Rows(labels_BMS, weights_BMS, SequenceSums(documents), batch.inputs, batch.sources_BK)
    routed_BMS = None
    if routes and (objective.num_depths or batch.real_BS is not None):
        real_BS = torch.ones_like(batch.labels_BS, dtype=torch.bool) if batch.real_BS is None else batch.real_BS
        routed_BMS = routed_tokens(real_BS, objective.num_depths, batch.documents_BS)
    own = own_part(rows, batch, cp)
    own_routed_BMS = None if routed_BMS is None else cp.own(routed_BMS)
    starts = range(0, batch.num_rows, micro_batch_size)
    keys_BL = batch.per_token.get(TOKEN_KEYS)
    items = [_micro_batch(own, own_routed_BMS, documents, cp, keys_BL, slice(start, start + micro_batch_size))
             for start in starts]
    num_sequences = batch.num_rows if batch.real_BS is None else batch.real_BS.any(1).sum()
    return Division(rows, cp.own(batch.tokens_BS), MicroBatches(items), num_sequences)


def _check(batch: Batch, objective: Objective, micro_batch_size: int) -> None:
    missing = [name for name in objective.inputs if name not in batch.inputs]
    if missing:
        raise ValueError(f"{type(objective).__name__} reads {', '.join(missing)}, which the batch does not have; it "
                         f"has {', '.join(batch.inputs) or 'nothing beside tokens and labels'}")
    if micro_batch_size % objective.rows_together:
        raise ValueError(f"--micro-batch-size {micro_batch_size} is not a multiple of the {objective.rows_together} "
                         f"rows that {type(objective).__name__} takes together")
    assert batch.num_rows % micro_batch_size == 0, (batch.num_rows, micro_batch_size)


def own_part(rows: Rows, batch: Batch, cp: ContextParallel) -> Rows:
    """Return `rows` with those of their tokens that this context rank has."""
    if cp.size == 1:
        return rows
    inputs = {name: cp.own(tensor, dim=1) for name, tensor in batch.per_token.items()}
    positions_S = cp.positions(batch.tokens_BS.shape[1])
    return replace(rows, labels_BMS=cp.own(rows.labels_BMS), weights_BMS=cp.own(rows.weights_BMS),
                   sums=replace(rows.sums, positions_S=positions_S, group=cp.group),
                   inputs={**batch.inputs, **inputs})


def _micro_batch(rows: Rows, routed_BMS: torch.Tensor | None, documents: Documents | None, cp: ContextParallel,
                 keys_BL: torch.Tensor | None, chosen: slice) -> MicroBatch:
    own_documents = None if documents is None else documents[chosen]
    own = replace(
        rows, labels_BMS=rows.labels_BMS[chosen], weights_BMS=rows.weights_BMS[chosen],
        sums=replace(rows.sums, documents=own_documents),
        inputs={name: tensor[chosen] for name, tensor in rows.inputs.items()},
        sources_BK=None if rows.sources_BK is None else rows.sources_BK[chosen])
    seq_length = rows.labels_BMS.shape[2] * cp.size
    mask = CausalMask.on_rank(cp, seq_length, own_documents)
    keys = TokenKeys() if keys_BL is None else TokenKeys(keys_BL[chosen], cp)
    return MicroBatch(own, None if routed_BMS is None else routed_BMS[chosen], mask, EmbeddingNoise.of(own.inputs),
                      keys, Replay(own.inputs.get(REPLAYED)))
