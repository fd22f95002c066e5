"""Batches, the sums along their rows, and where their documents are found."""

import pytest
import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.sequence_sums import SequenceSums

NUMBERS = torch.tensor([[3, 3, 1, 1, 1, 8], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]])


def batch(**more) -> Batch:
    tokens = torch.arange(18).view(3, 6)
    return Batch(tokens_BS=tokens, labels_BS=tokens + 1, weights_BS=torch.ones(3, 6), **more)


@pytest.mark.parametrize("wrong, said", [
    (dict(labels_BS=torch.zeros(3, 5, dtype=torch.int64)), r"labels_BS has the shape \(3, 5\) in a batch of \(3, 6\)"),
    (dict(weights_BS=torch.ones(3, 6, dtype=torch.bool)), "weights_BS are torch.bool: they must be floating-point"),
    (dict(sources_BK=torch.ones(2, 2).bool()), r"sources_BK has the shape \(2, 2\) in a batch of \(3,\)"),
    (dict(per_token={"reference": torch.ones(3, 1)}), r"reference has the shape \(3, 1\) in a batch of \(3, 6\)"),
    (dict(per_row={"reward": torch.ones(6)}), r"reward has the shape \(6,\) in a batch of \(3,\)")])
def test_what_does_not_fit_is_named(wrong, said):
    made = batch()
    fields = dict(tokens_BS=made.tokens_BS, labels_BS=made.labels_BS, weights_BS=made.weights_BS)
    with pytest.raises(ValueError, match=said):
        Batch(**fields | wrong)


def test_rows_are_taken_of_everything():
    made = batch(documents_BS=NUMBERS, per_token={"teacher": torch.rand(3, 6, 4)}, per_row={"reward": torch.rand(3)})
    part = made.rows(slice(1, 3))
    assert part.num_rows == 2 and torch.equal(part.documents_BS, NUMBERS[1:])
    assert part.inputs.keys() == {"teacher", "reward"}
    assert torch.equal(part.inputs["teacher"], made.inputs["teacher"][1:])
    assert torch.equal(part.inputs["reward"], made.inputs["reward"][1:]) and part.sources_BK is None


def test_documents_stay_on_the_host():
    made = batch(documents_BS=NUMBERS, per_row={"reward": torch.rand(3)}).to(torch.device("meta"))
    assert made.documents_BS is NUMBERS
    assert {made.tokens_BS.device.type, made.weights_BS.device.type, made.per_row["reward"].device.type} == {"meta"}


def test_places_are_counted_within_rows():
    found = Documents.find(NUMBERS)
    assert found.rows == ((slice(0, 2), slice(2, 5), slice(5, 6)), (slice(0, 6),), tuple(
        slice(i, i + 1) for i in range(6)))
    assert (found.most, found[1:2].most) == (6, 1)
    assert found.places_BS.tolist() == [[0, 0, 1, 1, 1, 2], [0] * 6, [0, 1, 2, 3, 4, 5]]


def test_sums_along_rows_and_documents():
    x_BS = torch.arange(18, dtype=torch.float64).view(3, 6).requires_grad_()
    sums = SequenceSums(Documents.find(NUMBERS)[:2])
    assert sums.per_row(x_BS[:2]).tolist() == [15, 51]
    assert sums.per_document(x_BS[:2]).tolist() == [[1, 9, 5], [51, 0, 0]]
    assert SequenceSums().per_document(x_BS).tolist() == [[15], [51], [87]]
    (sums.per_document(x_BS[:2]) * torch.tensor([[1, 2, 3], [4, 5, 6]])).sum().backward()
    assert x_BS.grad.tolist() == [[1, 1, 2, 2, 2, 3], [4] * 6, [0] * 6]
    assert sums.share(torch.tensor([1.0, 2.0])) == 3
