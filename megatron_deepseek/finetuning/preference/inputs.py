"""What a batch of preference tuning has beside its tokens: numbers of documents, and for KTO the rows of its KL term.

A document's number stands on its first token, 0 on all others: its sum over the document is the number again, also
where context ranks share the row.

Shapes: B rows, S tokens.
"""

from dataclasses import replace

import numpy as np
import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import Sampler, sample_indices
from megatron_deepseek.finetuning.preference.objectives import LAST, REFERENCE, VALUES
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.finetuning.units import Units
from megatron_deepseek.runtime.task import TrainingData

Sums = tuple[np.ndarray, ...]  # of each dataset a number for each sample


class PreferenceSampler:
    """A sampler of rows with the numbers of their documents: values, and the reference's sums where `sums` has them."""

    def __init__(self, sampler: TrainingData, rows: Rows, sums: Sums | None):
        self.sampler, self.rows, self.sums = sampler, rows, sums
        self.source_names = ()  # losses are not told apart by dataset

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int,
              dp_rank: int = 0, dp_size: int = 1) -> Batch:
        where = consumed_samples, global_batch_size, micro_batch_size, dp_rank, dp_size
        batch, numbers = self.sampler.batch(*where), sample_indices(*where)
        columns = {VALUES: self.rows.values} | ({} if self.sums is None else {REFERENCE: self.sums})
        more = {name: torch.stack([on_first_tokens(documents_S, self._of_row(number, column)) for number, documents_S
                                   in zip(numbers, batch.documents_BS)]) for name, column in columns.items()}
        more[LAST] = last_tokens(batch.documents_BS)
        return replace(batch, sources_BK=None, per_token={**batch.per_token, **more})

    def _of_row(self, number: int, column: Sums) -> list[float]:
        return [float(column[source][sample]) for source, sample in self.rows.samples_in(number)]


def on_first_tokens(documents_S: torch.Tensor, values: list[float]) -> torch.Tensor:
    """Return float64 [S] with the value of each document on its first token; padding is a document without a value."""
    lengths_D = torch.bincount(documents_S, minlength=len(values) + 1)
    starts_D = (lengths_D.cumsum(0) - lengths_D)[:len(values)]
    placed_S = torch.zeros(len(documents_S), dtype=torch.float64)
    placed_S[starts_D] = torch.tensor(values, dtype=torch.float64)
    return placed_S


def last_tokens(documents_BS: torch.Tensor) -> torch.Tensor:
    """Return float64 [B, S] with 1 on the last token of each document, padding included, and 0 on all others."""
    return (documents_BS != torch.nn.functional.pad(documents_BS[:, 1:], (0, 1), value=-1)).double()


class MismatchedRows:
    """The rows in which every answer stands behind the question of its unit's other sample (units.py).

    A row holds whole units, so it has as many tokens as before. A sample that is alone in its unit has no loss there.
    """

    def __init__(self, rows: Rows):
        self.rows, self.names = rows, ()
        self._partners = [Units(lengths, rows.prepared.settings, source).partners
                          for source, lengths in enumerate(rows.plan.lengths)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        here = self.rows.samples_in(number)
        return self.rows.filled([self._mismatched(*each) for each in here], 0)

    def _mismatched(self, source: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and weights of a sample's question with the answer of its partner."""
        ids, weights = self.rows.sample(source, sample)
        partner = int(self._partners[source][sample])
        if partner < 0:
            return ids, np.zeros_like(weights)
        other_ids, other_weights = self.rows.sample(source, partner)
        begin, other = _begin_of_answer(weights), _begin_of_answer(other_weights)
        return (np.concatenate([ids[:begin], other_ids[other:]]),
                np.concatenate([weights[:begin], other_weights[other:]]))


def _begin_of_answer(weights: np.ndarray) -> int:
    return int(np.flatnonzero(weights)[0])


# The rows of the KL term travel as inputs of the batch, under these names; `take_mismatched` takes them out again.
_TOKENS, _LABELS, _WEIGHTS, _DOCUMENTS = (f"mismatched_{name}" for name in ("tokens", "labels", "weights", "documents"))
_REAL, MISMATCHED_REFERENCE = "mismatched_real", "mismatched_reference"


class MismatchedSampler:
    """A sampler that puts the mismatched rows of each row beside it, with the reference's sums where there are some."""

    def __init__(self, sampler: TrainingData, rows: Rows, vocab_size: int, option: str, sums: Sums | None):
        self.sampler, self.source_names = sampler, sampler.source_names
        self.mismatched = PreferenceSampler(Sampler(MismatchedRows(rows), vocab_size, option), rows, sums)

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int,
              dp_rank: int = 0, dp_size: int = 1) -> Batch:
        where = consumed_samples, global_batch_size, micro_batch_size, dp_rank, dp_size
        batch, other = self.sampler.batch(*where), self.mismatched.batch(*where)
        more = {_TOKENS: other.tokens_BS, _LABELS: other.labels_BS, _WEIGHTS: other.weights_BS,
                _DOCUMENTS: other.documents_BS, _REAL: other.real_BS}
        if REFERENCE in other.per_token:
            more[MISMATCHED_REFERENCE] = other.per_token[REFERENCE]
        return replace(batch, per_token={**batch.per_token, **more})


def take_mismatched(batch: Batch) -> tuple[Batch, Batch]:
    """Return the batch without its mismatched rows, and these as a batch of their own."""
    own = batch.per_token
    names = (_TOKENS, _LABELS, _WEIGHTS, _DOCUMENTS, _REAL, MISMATCHED_REFERENCE)
    kept = {name: tensor for name, tensor in own.items() if name not in names}
    reference = {REFERENCE: own[MISMATCHED_REFERENCE]} if MISMATCHED_REFERENCE in own else {}
    mismatched = Batch(tokens_BS=own[_TOKENS], labels_BS=own[_LABELS], weights_BS=own[_WEIGHTS],
                       documents_BS=own[_DOCUMENTS].cpu(), real_BS=own[_REAL], per_token=reference)
    return replace(batch, per_token=kept), mismatched
