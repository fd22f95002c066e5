"""Peaks of activations by replaying schedules, against what is known of how many micro-batches each keeps."""

import pytest

from megatron_deepseek.planning.actions import Run, actions, held_stages
from megatron_deepseek.planning.phases import (
    BEFORE,
    BEGUN,
    FREED_BEGUN,
    FREED_SUMMED,
    GATHERED,
    REDUCED,
    SUMMED,
    Turn,
    turns,
)
from megatron_deepseek.planning.replay import Piece, StageBytes, most_in_flight, replay, taking_turns


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


@pytest.mark.parametrize("one, other, expected", [
    ([Piece(5)], [Piece(7)], (7, 0)),  # one follows the other
    ([Piece(5, left=2)], [Piece(7, left=-4)], (9, 0)),
    # 5 | 1 + 2 | 8 + 3 | 2 + 6 | -1: while the one is at its peak of 8 the other has 3 left, not its peak of 7
    ([Piece(5, left=2), Piece(8, left=-1)], [Piece(1, left=3), Piece(7, left=0)], (11, 0)),
    # 5 | 1 + 2 | 2 + 0 | 4 + 3 | 9 + 3: the one that has ended leaves the other alone
    ([Piece(5, left=2), Piece(2, left=3)], [Piece(1, left=0), Piece(4, left=3), Piece(9)], (12, 0)),
    ([Piece(5, 1, 2, -3)], [Piece(7, 4)], (9, 1))])
def test_runs_that_take_turns(one, other, expected):
    """By hand, piece by piece; the second number is how many of the bytes are weights."""
    assert taking_turns(one, other) == expected


def test_a_pair_is_at_its_peaks_at_once_only_if_it_may_be():
    """Both stages need 7 more while they run, so either both do or the one and then the other."""
    acts = actions("DualPipeV", 2, 2, 4, 0)
    sizes = {stage: StageBytes(10, forward=7, backward=7) for stage in (0, 3)}
    at_once, in_turn = (replay(acts, sizes, together).bytes for together in (True, False))
    assert at_once == in_turn + 7 == 10 * most_in_flight(acts, (0, 3)) + 14


def test_weights_come_back_with_a_backward_and_go_with_a_forward():
    """A stage whose forwards free its weights, with a forward between two backwards, and between I and W."""
    acts = [(Run(kind, 0, number),) for kind, number in
            (("F", 0), ("F", 1), ("I", 0), ("F", 2), ("W", 0), ("B", 1), ("F", 3), ("I", 2), ("W", 2), ("B", 3))]
    found = [turn for (turn,) in turns(acts, regathers=True)]
    assert found == [
        Turn("F", BEFORE, GATHERED), Turn("F", GATHERED, GATHERED), Turn("I", GATHERED, BEGUN),
        Turn("F", BEGUN, FREED_BEGUN), Turn("W", FREED_BEGUN, FREED_SUMMED), Turn("B", FREED_SUMMED, SUMMED),
        Turn("F", SUMMED, FREED_SUMMED), Turn("I", FREED_SUMMED, SUMMED), Turn("W", SUMMED, SUMMED),
        Turn("B", SUMMED, REDUCED)]
    assert not {FREED_BEGUN, FREED_SUMMED} & {phase for (turn,) in turns(acts) for phase in turn[1:]}
