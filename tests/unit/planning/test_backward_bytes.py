"""What a unit of FSDP takes while its gradients are reduced, by hand, and how exchanges cut a backward into pieces."""

import pytest

from megatron_deepseek.planning.backward_bytes import Instant, in_turn
from megatron_deepseek.planning.byte_tape import Tape
from megatron_deepseek.planning.held_parameters import Held
from megatron_deepseek.planning.numbers import Numbers
from megatron_deepseek.planning.phases import GATHERED, REDUCED, SUMMED
from megatron_deepseek.planning.stage_states import Sizes

PARAMETERS = 300  # of a unit, of which the last to be copied has a third


@pytest.mark.parametrize("ranks, first, expected", [
    (1, GATHERED, 4 + 2),  # the buffer is what comes out, and the gradients are there until they are copied to it
    (2, GATHERED, 4 + 2 / 3 + 2),  # half of the buffer comes out, when the last gradient is still there
    (4, GATHERED, 4 + 2),  # a quarter and a third of the gradients are less than these
    (2, SUMMED, 4)])  # sums are counted as what stood before
def test_a_reduction(ranks, first, expected):
    """Bytes of a parameter: 4 in the buffer that is reduced, 2 of its gradient, or 4 of its sum."""
    size = Sizes(2, 0, 4 if first == SUMMED else 0, 4, (4 / ranks,) * 2, (4 / ranks if ranks > 1 else 0.0,) * 2)
    instant = Instant(0.0, ending=Held(PARAMETERS, 0), last=PARAMETERS / 3)
    assert in_turn(instant, (first, REDUCED), size, (True, True)) == pytest.approx(expected * PARAMETERS)


def test_a_last_backward_frees_what_was_gathered():
    """Also of frozen weights, which have nothing to reduce; one that others follow leaves all of it."""
    size, instant = Sizes(2, 2, 4, 4, (4.0,) * 2, (0.0,) * 2), Instant(1000.0, freed=300.0)
    assert in_turn(instant, (SUMMED, REDUCED), size, (True, True)) == 700
    assert in_turn(instant, (SUMMED, SUMMED), size, (True, True)) == 1000


def test_exchanges_end_pieces():
    """Each is noted with what is there while it waits; the second begins before anything else is made."""
    tape = Tape([], [], False, Numbers())
    tape.make(5)
    tape.exchange(2)
    tape.make(1)
    assert [(each.piece, each.bytes, each.waits) for each in tape.moments] == [
        (0, 5, False), (0, 5, True), (1, 5, True), (2, 6, False)]
