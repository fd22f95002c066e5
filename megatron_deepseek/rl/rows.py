"""Samples to the rows of a data rank's batch: several a row, as documents that do not see each other.

Position s of a row holds a token, and its label is the next one. What is known of a label stands at s: its advantage,
its log-probabilities, the ids that it was drawn among; what is known of the token, its experts, stands there too. So a
sample of n tokens takes n - 1 places.

Rows are the same whatever the number of data ranks; these take them in the order of their work, to and fro, so that
all have as many, and about as much to do.

Shapes: B rows of this data rank, S = seq_length, D data ranks, N samples, M ids that a token was drawn among, L MoE
layers, K experts of a token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.finetuning.packing import pack
from megatron_deepseek.finetuning.rows import filled_row
from megatron_deepseek.parallel.schedule_rules import takes_microbatches
from megatron_deepseek.rl.samples import ADVANTAGES, KEPT_IDS, REPLAYED, ROLLOUT, Sample

OfTokens = Sequence[Sequence[float] | torch.Tensor]  # of each sample a number for each token of its completion


@dataclass(frozen=True)
class RowShape:
    """The shape of the rows that a job trains on, and which of them one data rank takes.

    `schedule` and `pp` say which numbers of micro-batches the pipeline takes.
    """

    seq_length: int
    micro_batch_size: int
    pad: int
    dp_rank: int = 0
    dp: int = 1
    schedule: str = "none"
    pp: int = 1

    def rows_each(self, rows: int) -> int:
        """Return how many rows each data rank gets, so that all together have place for `rows`; at least a micro-batch.
        """
        microbatches = max(1, -(-rows // (self.dp * self.micro_batch_size)))
        while self.pp > 1 and not takes_microbatches(self.schedule, self.pp, microbatches):
            microbatches += 1
        return microbatches * self.micro_batch_size


@dataclass(frozen=True)
class Place:
    """Where the labels of a sample's completion stand: in which row of the batch, and from which position to which."""

    sample: int
    row: int
    labels: slice


@dataclass(frozen=True, eq=False)
class PackedSamples:
    """One data rank's rows, and the places of the samples that are in them."""

    batch: Batch
    places: tuple[Place, ...]

    def of_samples(self, x_BS: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return what x has for the tokens of each completion that is in these rows, by the number of the sample."""
        return {place.sample: x_BS[place.row, place.labels] for place in self.places}


def pack_samples(samples: Sequence[Sample], advantages_N: torch.Tensor, shape: RowShape,
                 of_tokens: Mapping[str, OfTokens] | None = None, masks_unfinished: bool = False) -> PackedSamples:
    """Return this data rank's rows of a global batch of samples. Every rank of the job gives the same samples.

    Beside ADVANTAGES and ROLLOUT the batch has what `of_tokens` has by name, such as OLD and REFERENCE, float64 [B, S],
    0 where no completion's label is; and KEPT_IDS and REPLAYED if any sample has them. `masks_unfinished` takes the
    loss weights from samples that were cut off.

    Raise ValueError for a sample that is longer than a row.
    """
    lengths = np.array([len(sample.prompt) + len(sample.tokens) - 1 for sample in samples], np.int64)
    _check(samples, lengths, shape)
    rows = rows_of_rank(lengths, shape)
    places = tuple(_places(samples, lengths, rows))
    batch = _batch([[_ids_and_weights(samples[number], masks_unfinished) for number in row] for row in rows], shape)
    numbers = {ADVANTAGES: [[each] * len(sample.tokens) for each, sample in zip(advantages_N.tolist(), samples)],
               ROLLOUT: [sample.log_probabilities for sample in samples], **(of_tokens or {})}
    per_token = {name: _laid_out(batch, places, each) for name, each in numbers.items()}
    if any(sample.kept_ids is not None for sample in samples):
        per_token[KEPT_IDS] = _kept_ids(batch, places, samples)
    if any(sample.experts for sample in samples):
        per_token[REPLAYED] = _replayed(batch, places, samples)
    return PackedSamples(replace(batch, per_token=per_token), places)


def _check(samples: Sequence[Sample], lengths: np.ndarray, shape: RowShape) -> None:
    assert all(sample.prompt and sample.tokens for sample in samples), "a sample without a prompt or a completion"
    if len(samples) and lengths.max() > shape.seq_length:
        longest = samples[int(lengths.argmax())]
        raise ValueError(f"--seq-length {shape.seq_length} is too short for a prompt of {len(longest.prompt)} tokens "
                         f"and a completion of {len(longest.tokens)} (--max-completion-length): a row takes them whole")


def rows_of_rank(lengths: np.ndarray, shape: RowShape) -> list[list[int]]:
    """Return the numbers of the samples in each of this data rank's rows, in order; blank rows are empty.

    The work of a row is that of its tokens and that of its attention, which grows with the square of a sample's length.
    Their ratio depends on the model; for the order it is enough that one attention of a full row counts as its tokens.
    """
    order, starts = pack(lengths, shape.seq_length, seed=0)
    rows = [sorted(order[begin:end].tolist()) for begin, end in zip(starts, starts[1:])]
    work = [float((lengths[row] * (1 + lengths[row] / shape.seq_length)).sum()) for row in rows]
    ranked = sorted(range(len(rows)), key=lambda number: (-work[number], number))
    own = [rows[number] for place, number in enumerate(ranked) if _rank_at(place, shape.dp) == shape.dp_rank]
    return own + [[]] * (shape.rows_each(len(rows)) - len(own))


def _rank_at(place: int, dp: int) -> int:
    """Return which data rank takes the row at this place: they take turns from the first to the last and back."""
    turn, rank = divmod(place, dp)
    return rank if turn % 2 == 0 else dp - 1 - rank


def _places(samples: Sequence[Sample], lengths: np.ndarray, rows: list[list[int]]) -> Iterable[Place]:
    for row, numbers in enumerate(rows):
        begin = 0
        for number in numbers:
            end = begin + int(lengths[number])
            yield Place(number, row, slice(end - len(samples[number].tokens), end))
            begin = end


def _ids_and_weights(sample: Sample, masks_unfinished: bool) -> tuple[np.ndarray, np.ndarray]:
    counts = 1.0 if sample.finished or not masks_unfinished else 0.0
    weights = np.repeat(np.float32([0.0, counts]), [len(sample.prompt), len(sample.tokens)])
    return np.array(sample.prompt + sample.tokens, np.int64), weights


def _batch(rows: list[list[tuple[np.ndarray, np.ndarray]]], shape: RowShape) -> Batch:
    items = [filled_row(row, shape.seq_length, shape.pad) for row in rows]
    tokens, labels, weights, documents, real = (torch.stack([item[name] for item in items]) for name in (
        "tokens", "labels", "loss_mask", "documents", "real"))
    return Batch(tokens_BS=tokens, labels_BS=labels, weights_BS=weights, documents_BS=documents, real_BS=real)


def _laid_out(batch: Batch, places: Sequence[Place], numbers: OfTokens) -> torch.Tensor:
    """Return the samples' numbers where their labels stand, float64 [B, S], 0 elsewhere."""
    found_BS = torch.zeros(batch.tokens_BS.shape, dtype=torch.float64)
    for place in places:
        found_BS[place.row, place.labels] = torch.as_tensor(numbers[place.sample], dtype=torch.float64)
    return found_BS


def _kept_ids(batch: Batch, places: Sequence[Place], samples: Sequence[Sample]) -> torch.Tensor:
    """Return the ids that each label was drawn among, int32 [B, S, M], -1 behind the last one."""
    most = max((len(ids) for place in places for ids in samples[place.sample].kept_ids or ()), default=0)
    found_BSM = torch.full((*batch.tokens_BS.shape, max(1, most)), -1, dtype=torch.int32)
    for place in places:
        if kept := samples[place.sample].kept_ids:
            ids_TM = pad_sequence([*kept], batch_first=True, padding_value=-1)
            found_BSM[place.row, place.labels, :ids_TM.shape[1]] = ids_TM
    return found_BSM


def _replayed(batch: Batch, places: Sequence[Place], samples: Sequence[Sample]) -> torch.Tensor:
    """Return the experts of each token, [B, S, L, K] in the samples' dtype, -1 where none are known."""
    example = next(sample.experts for sample in samples if sample.experts)
    layer = next(iter(example.values()))
    found_BSLK = torch.full((*batch.tokens_BS.shape, len(example), layer.shape[-1]), -1, dtype=layer.dtype)
    for place in places:
        if experts := samples[place.sample].experts:
            of_tokens_TLK = torch.stack([*experts.values()], 1)
            end = place.labels.stop
            found_BSLK[place.row, end - len(of_tokens_TLK):end] = of_tokens_TLK
    return found_BSLK
