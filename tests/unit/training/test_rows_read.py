"""Rows through a trainer on one process: scores of the tokens that are meant, and what follows the row that is meant.

Layouts are compared with one process in tests/parallel/test_reading_rows.py.
"""

import pytest
import torch
from small_models import training_batch
from small_trainers import CONFIG, SEQ_LENGTH, trainer

from megatron_deepseek.training.reading_rows import continue_rows, score_rows

WHOLE = torch.randint(CONFIG.vocab_size, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(5)).tolist()
ROWS = [WHOLE[0], WHOLE[1], WHOLE[0][:3]]  # in micro-batches of two; the last one is how the first one begins


@pytest.fixture(scope="module")
def made(meshes):
    return trainer(meshes)


@pytest.fixture(scope="module")
def batch():
    ids_BS = torch.tensor(WHOLE)
    return training_batch(ids_BS[:, :-1], ids_BS[:, 1:], torch.ones(2, SEQ_LENGTH))


def test_scores_are_of_each_token_but_the_first(made, batch):
    """`Trainer.score` itself is held against a plain model by test_objectives.py."""
    expected, right = made.score(batch).log_probabilities_BS, made.likeliest(batch) == batch.labels_BS
    (first, of_first), (second, of_second), (begin, of_begin) = score_rows(made, ROWS)
    assert torch.tensor([first, second], dtype=torch.float64).allclose(expected.double(), rtol=1e-9)
    assert [of_first, of_second] == right.tolist()
    assert begin == pytest.approx(first[:2], rel=1e-9) and of_begin == of_first[:2]


def test_a_label_that_is_the_likeliest_is_known_as_such(made, batch):
    tokens = made.likeliest(batch)[:, -1].tolist()
    likely = [[*row[:-1], token] for row, token in zip(WHOLE, tokens)]
    assert [right[-1] for _, right in score_rows(made, likely)] == [True, True]


def test_what_follows_is_the_likeliest_until_it_ends(made, batch):
    likeliest = made.likeliest(batch)
    (first,), none, (begun, *more) = continue_rows(
        made, [WHOLE[0][:2], WHOLE[1][:SEQ_LENGTH], WHOLE[0][:3]], [1, 4, 9], lambda number, tokens: len(tokens) == 2)
    assert first == int(likeliest[0, 1]) and begun == int(likeliest[0, 2])
    assert none == [] and len(more) == 1  # a row that is full has no room for more
