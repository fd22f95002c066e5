"""Peaks of activations by replaying schedules, against what is known of how many micro-batches each keeps."""

import pytest

from megatron_deepseek.planning.actions import actions, held_stages
from megatron_deepseek.planning.replay import StageBytes, most_in_flight, replay


def in_flight(schedule: str, pp: int, virtual_stages: int, micro_batches: int) -> list[int]:
    return [most_in_flight(actions(schedule, pp, virtual_stages, micro_batches, rank),
                           held_stages(schedule, pp, virtual_stages, rank)) for rank in range(pp)]


@pytest.mark.parametrize("schedule, pp, virtual_stages, micro_batches, expected", [
    ("GPipe", 4, 1, 8, [8] * 4),
    ("1F1B", 4, 1, 8, [4, 3, 2, 1]),
    ("Interleaved1F1B", 4, 4, 32, [43, 41, 39, 37]),
    ("DualPipe", 16, 1, 120, [17] * 16),
    ("DualPipeV", 8, 2, 60, [17] * 8),
    ("1F1B", 1, 1, 8, [1])])
def test_known_numbers_of_micro_batches(schedule, pp, virtual_stages, micro_batches, expected):
    """1F1B keeps p - r; DualPipe p + 1 on each of its ranks (its README). torch's interleaved one takes rounds of all
    micro-batches // (micro-batches // p), here 4, as Megatron-LM does: (v - 1) q + 2 (p - 1 - r) + 1 chunks.
    """
    if schedule == "Interleaved1F1B":
        expected = [(virtual_stages - 1) * 4 + 2 * (pp - 1 - rank) + 1 for rank in range(pp)]
        assert expected == [19, 17, 15, 13]
    assert in_flight(schedule, pp, virtual_stages, micro_batches) == expected


def test_a_peak_by_hand():
    """1F1B, rank 0 of 2: at the first backward two micro-batches are kept, and the backward needs its own beside."""
    peak = replay(actions("1F1B", 2, 1, 4, 0), {0: StageBytes(kept=10, forward=3, backward=5)})
    assert (peak.bytes, peak.in_flight, peak.running) == (25, {0: 2}, 5)


def test_what_waits_for_its_weight_gradient_is_counted():
    with_rest = [replay(actions("InterleavedZeroBubble", 4, 2, 8, 3), {
        stage: StageBytes(kept=10, waiting=waiting) for stage in (3, 7)}).bytes for waiting in (0, 4)]
    assert with_rest[1] > with_rest[0]


def test_a_pair_is_at_its_worst():
    acts = actions("DualPipeV", 2, 2, 4, 0)
    plain, paired = (replay(acts, {stage: StageBytes(10, backward=backward) for stage in (0, 3)})
                     for backward in (0, 7))
    assert plain.bytes == 10 * most_in_flight(acts, (0, 3)) and paired.bytes == plain.bytes + 7
