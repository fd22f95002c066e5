"""Rows of tokens through a model in training, in whatever layout it is: how likely their tokens are, what follows them.

Data ranks share the rows. All ranks call these functions with the same rows, and get the same results.

Shapes: B rows of this data rank, S = seq_length.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import sample_indices
from megatron_deepseek.training.trainer import Trainer

Row = Sequence[int]


def score_rows(trainer: Trainer, rows: Sequence[Row]) -> list[tuple[list[float], list[bool]]]:
    """Return log p of each token of a row but the first, in nats, and whether it is the likeliest there.

    A row has at least two tokens, and at most seq_length + 1.
    """
    own = _own_numbers(trainer, len(rows))
    inputs = [rows[number][:-1] if number < len(rows) else [0] for number in own]
    labels = [rows[number][1:] if number < len(rows) else [0] for number in own]
    batch = _batch(inputs, labels, trainer.spec.seq_length).to(trainer.meshes.device)
    scores = trainer.score(batch, likeliest=True)
    values, likeliest = scores.log_probabilities_BS.tolist(), scores.likeliest_BS.tolist()
    found = {number: (values[place][:len(labels[place])], likeliest[place][:len(labels[place])])
             for place, number in enumerate(own) if number < len(rows)}
    return _of_all_ranks(found, len(rows))


def continue_rows(trainer: Trainer, rows: Sequence[Row], most: Sequence[int], ends: Callable[[int, list[int]], bool]
                  ) -> list[list[int]]:
    """Return the likeliest tokens after each row, at most as many as `most` says of it.

    `ends(number, tokens)` says after each token whether a row's continuation is finished; so is one whose row is full.
    Every new token is one evaluation of whole rows, so this costs as many forwards as the longest continuation has
    tokens: it is meant for a few rows.
    """
    own = _own_numbers(trainer, len(rows))
    full = [list(rows[number]) if number < len(rows) else [0] for number in own]
    begun, length = [len(row) for row in full], trainer.spec.seq_length
    done = [number >= len(rows) or not most[number] or len(row) >= length for number, row in zip(own, full)]
    while not _everywhere(all(done), trainer):
        batch = _batch(full, [[] for _ in full], length)
        following_BS = trainer.likeliest(batch.to(trainer.meshes.device)).cpu()
        for place, (number, row) in enumerate(zip(own, full)):
            if done[place]:
                continue
            row.append(int(following_BS[place, len(row) - 1]))
            made = row[begun[place]:]
            done[place] = len(made) >= most[number] or len(row) >= length or ends(number, made)
    found = {number: row[first:] for number, row, first in zip(own, full, begun) if number < len(rows)}
    return _of_all_ranks(found, len(rows))


def _own_numbers(trainer: Trainer, rows: int) -> list[int]:
    """Return the numbers of this data rank's rows, in micro-batches that are filled up with numbers beyond the last."""
    size, dp = trainer.spec.micro_batch_size, trainer.meshes.layout.dp
    whole = -(-max(rows, 1) // (size * dp)) * size * dp
    return sample_indices(0, whole, size, trainer.meshes.rank("dp"), dp)


def _batch(rows: Sequence[Row], labels: Sequence[Row], seq_length: int) -> Batch:
    """Return rows with padding behind them, which a causal model's tokens don't see."""
    tokens_BS, labels_BS = (torch.zeros(len(rows), seq_length, dtype=torch.int64) for _ in range(2))
    for into_BS, each in ((tokens_BS, rows), (labels_BS, labels)):
        for place, ids in enumerate(each):
            into_BS[place, :len(ids)] = torch.tensor(ids, dtype=torch.int64)
    lengths_B = torch.tensor([len(row) for row in rows])
    return Batch(tokens_BS=tokens_BS, labels_BS=labels_BS, weights_BS=torch.zeros(tokens_BS.shape),
                 real_BS=torch.arange(seq_length) < lengths_B[:, None])


def _of_all_ranks(found: dict, number: int) -> list:
    """Return what the ranks found, in the order of the rows."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    together = {number: each for part in everyone for number, each in part.items()}
    return [together[place] for place in range(number)]


def _everywhere(done: bool, trainer: Trainer) -> bool:
    """Return whether all ranks are done: they make forwards together."""
    told = torch.tensor(int(done), device=trainer.meshes.device)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return bool(told.item())
