"""Samples to rows: every number where its label stands, each sample once, and as many rows on every data rank."""

import pytest
import torch

from megatron_deepseek.rl.rows import PackedSamples, RowShape, pack_samples
from megatron_deepseek.rl.samples import ADVANTAGES, KEPT_IDS, OLD, REPLAYED, ROLLOUT, Sample

PAD = 99


def sample(number: int, prompt: int, completion: int, finished: bool = True, **more) -> Sample:
    """Ids 1000 * number + 0, 1, ..., log-probabilities of the number and place in the completion."""
    ids = tuple(1000 * number + place for place in range(prompt + completion))
    log_p = tuple(-number - 0.01 * place for place in range(completion))
    return Sample(number // 2, ids[:prompt], ids[prompt:], "", "stop" if finished else "length", log_p, **more)


def two() -> list[Sample]:
    """Together 3 + 4 places."""
    return [sample(1, 2, 2), sample(2, 1, 4)]


def pack(samples, shape: RowShape | None = None, **more) -> PackedSamples:
    advantages = torch.tensor([0.5 * (number + 1) for number in range(len(samples))], dtype=torch.float64)
    return pack_samples(samples, advantages, shape or RowShape(8, 1, PAD), **more)


def test_numbers_stand_at_their_labels():
    """The row has 1000 1001 | 1002 1003, then 2000 | 2001 2002 2003 2004, of which the last ones are labels alone."""
    old = [[-7.0, -8.0], [-1.0, -2.0, -3.0, -4.0]]
    packed = pack(two(), of_tokens={OLD: old})
    batch = packed.batch
    assert batch.tokens_BS.tolist() == [[1000, 1001, 1002, 2000, 2001, 2002, 2003, PAD]]
    assert batch.labels_BS.tolist() == [[1001, 1002, 1003, 2001, 2002, 2003, 2004, PAD]]
    assert batch.weights_BS.tolist() == [[0, 1, 1, 1, 1, 1, 1, 0]]
    assert batch.documents_BS.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]
    assert batch.real_BS.tolist() == [[True] * 7 + [False]]
    assert batch.per_token[ADVANTAGES].tolist() == [[0, 0.5, 0.5, 1, 1, 1, 1, 0]]
    assert batch.per_token[ROLLOUT].tolist() == [[0, -1, -1.01, -2, -2.01, -2.02, -2.03, 0]]
    assert batch.per_token[OLD].tolist() == [[0, -7, -8, -1, -2, -3, -4, 0]]
    assert KEPT_IDS not in batch.per_token and REPLAYED not in batch.per_token


def test_numbers_come_back_by_sample():
    packed = pack(two())
    found = packed.of_samples(packed.batch.per_token[ROLLOUT])
    assert {number: each.tolist() for number, each in found.items()} == {
        number: list(each.log_probabilities) for number, each in enumerate(two())}


def test_kept_ids_stand_at_the_label_and_experts_at_the_token():
    kept = tuple(torch.tensor(each, dtype=torch.int32) for each in ([1002, 5, 6], [1003]))
    experts = {f"model.layers.{layer}.mlp": torch.tensor([[10 * layer + t, t] for t in range(3)], dtype=torch.int16)
               for layer in (3, 4)}
    packed = pack([sample(1, 2, 2, kept_ids=kept, experts=experts), sample(2, 1, 4)])
    found_SM, found_SLK = (packed.batch.per_token[name][0] for name in (KEPT_IDS, REPLAYED))
    assert found_SM.dtype == torch.int32 and found_SLK.dtype == torch.int16
    assert found_SM.tolist() == [[-1] * 3, [1002, 5, 6], [1003, -1, -1], *[[-1] * 3] * 5]
    assert found_SLK.tolist() == [*[[[30 + t, t], [40 + t, t]] for t in range(3)], *[[[-1, -1]] * 2] * 5]


def test_unfinished_samples_may_have_no_loss():
    samples = [sample(1, 2, 2, finished=False), sample(2, 1, 4)]
    assert pack(samples).batch.weights_BS.sum() == 6
    masked = pack(samples, masks_unfinished=True).batch
    assert masked.weights_BS.tolist() == [[0, 0, 0, 1, 1, 1, 1, 0]]
    assert masked.per_token[ADVANTAGES][0, 1] == 0.5 and masked.real_BS.sum() == 7


def test_a_sample_that_is_too_long_is_an_error():
    assert pack([sample(1, 4, 5)]).batch.num_rows == 1
    with pytest.raises(ValueError, match=r"--seq-length 8 is too short for a prompt of 5 tokens and a completion of 5"):
        pack([sample(1, 2, 2), sample(2, 5, 5)])


@pytest.mark.parametrize("schedule, pp, expected", [
    ("none", 1, 4), ("1F1B", 2, 4), ("1F1B", 4, 8), ("DualPipeV", 4, 16), ("Interleaved1F1B", 2, 4)])
def test_a_number_of_rows_that_the_pipeline_takes(schedule, pp, expected):
    """Three rows are two micro-batches of two on one data rank."""
    assert RowShape(8, 2, PAD, schedule=schedule, pp=pp).rows_each(3) == expected


def many(number: int = 41) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (number, 2), generator=generator).tolist()
    return [sample(place + 1, *each) for place, each in enumerate(lengths)]


@pytest.mark.parametrize("dp", (1, 2, 3, 4, 64))
def test_data_ranks_share_all_samples(dp):
    """Each sample once, as many rows everywhere, the blank ones all padding; the same rows for every dp."""
    parts = [pack(many(), RowShape(40, 2, PAD, rank, dp)) for rank in range(dp)]
    assert sorted(place.sample for part in parts for place in part.places) == [*range(41)]
    assert len({part.batch.num_rows for part in parts}) == 1
    whole = pack(many(), RowShape(40, 1, PAD)).batch

    def rows_of(batch):
        return {tuple(row) for row, real in zip(batch.tokens_BS.tolist(), batch.real_BS.any(1)) if real}

    assert set().union(*(rows_of(part.batch) for part in parts)) == rows_of(whole)
    for part in parts:
        blank = ~part.batch.real_BS.any(1)
        assert not part.batch.weights_BS[blank].any() and (part.batch.tokens_BS[blank] == PAD).all()
        for number, values in part.of_samples(part.batch.per_token[ROLLOUT]).items():
            assert values.tolist() == pytest.approx(many()[number].log_probabilities)


def test_data_ranks_have_about_the_same_work():
    """Four ranks and rows of 40 tokens: no rank has more than a row's tokens more than another."""
    tokens = [int(pack(many(), RowShape(40, 1, PAD, rank, 4)).batch.real_BS.sum()) for rank in range(4)]
    assert max(tokens) - min(tokens) <= 40 and sum(tokens) == sum(
        len(each.prompt) + len(each.tokens) - 1 for each in many())


def test_rows_are_the_same_every_time():
    one, other = (pack(many(), RowShape(40, 1, PAD)).batch for _ in range(2))
    assert torch.equal(one.tokens_BS, other.tokens_BS)


def test_no_samples_are_blank_rows():
    packed = pack([], RowShape(8, 2, PAD))
    assert packed.batch.num_rows == 2 and not packed.batch.real_BS.any() and not packed.places
