"""Iterations and samples of a run: ramps against Megatron's calculator, and resumes with other batches by hand."""

import json
from dataclasses import asdict

import pytest
from hypothesis import example, given, settings, strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_deepseek.checkpoint.train_state import TrainState, read_state
from megatron_deepseek.settings import BatchSettings, RunSettings
from megatron_deepseek.training.timeline import (
    Timeline, batch_sizes, global_batch_size, last_iteration, timeline, with_past)


@pytest.mark.parametrize("start, increment, samples, final", [
    (2, 2, 60, 8), (16, 8, 1000, 96), (3, 1, 10, 6),
    (1, 1, 9, 8)])
def test_ramp_is_megatrons(start, increment, samples, final):
    """The last case: 9 / (9 / 7) is below 7 in floating point, and Megatron's last size comes a sample late."""
    batch = BatchSettings(1, final, (start, increment, samples))
    calculator = RampupBatchsizeNumMicroBatchesCalculator(final, 1, 1, False, 1, start, increment, samples)
    sizes = set()
    for consumed in range(samples + 3 * final):
        calculator.update(consumed, consistency_check=False)
        assert global_batch_size(batch, consumed) == calculator.get_current_global_batch_size()
        sizes.add(global_batch_size(batch, consumed))
    assert batch_sizes(batch) == tuple(sorted(sizes))


def test_ramps_without_length_or_height_are_constant():
    assert global_batch_size(BatchSettings(1, 8, (8, 2, 100)), 0) == 8
    assert global_batch_size(BatchSettings(1, 8, (2, 2, 0)), 0) == 8


@pytest.mark.parametrize("ramp", [(0, 1, 10), (2, 0, 10), (2, 2, -1), (9, 1, 10), (3, 2, 10)])
def test_impossible_ramp_is_refused(ramp):
    with pytest.raises(ValueError, match="rampup_batch_size"):
        batch_sizes(BatchSettings(1, 8, ramp))


@st.composite
def batch_settings(draw) -> BatchSettings:
    start, increment, steps = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 6))
    ramp = draw(st.none() | st.just((start, increment, draw(st.integers(0, 150)))))
    return BatchSettings(1, start + steps * increment, ramp)


@given(st.lists(st.tuples(batch_settings(), st.integers(0, 25)), min_size=1, max_size=3))
@example([(BatchSettings(1, 10, (3, 1, 29)), 12)])  # the end of the ramp is met, and a size below the last comes there
@settings(max_examples=150, deadline=None)
def test_a_timeline_is_the_run_step_by_step(legs):
    """A run of several legs, each with other batches: what is said at the start of the last is what then happens, and
    what happened before is known.
    """
    state, ends = TrainState(), [0]
    for batch, updates in legs:
        expected = timeline(batch, state)
        for _ in range(updates):
            state = state.after(global_batch_size(batch, state.consumed_samples), True)
            ends.append(state.consumed_samples)
        assert timeline(batch, state).samples(state.iteration + 100) == expected.samples(state.iteration + 100)
    assert [expected.samples(iteration) for iteration in range(len(ends))] == ends
    for samples in range(min(ends[-1], 60)):
        assert expected.iterations(samples) == sum(0 < end <= samples for end in ends)
    assert all(one[1] != other[1] for one, other in zip(state.batches, state.batches[1:])), "one entry for each size"


def test_a_ramp_of_many_samples_is_not_walked():
    """10^12 samples of some thousand sizes; walked batch by batch this would take hours."""
    line = timeline(BatchSettings(1, 4096, (1, 1, 10**12)))
    assert len(line.batches) == 4095 and line.samples(line.iterations(10**12)) <= 10**12 < line.samples(
        line.iterations(10**12) + 1)


@pytest.mark.parametrize("size, last", [(4, 12), (8, 9), (2, 18), (5, 10)])
def test_a_run_in_samples_goes_on_with_another_batch_size(size, last):
    """24 of 48 samples were done in 6 batches of 4: 3 of 8 are left, or 12 of 2, or 4 of 5 and a rest of 4."""
    state = TrainState(6, 24, 6, ((6, 4),))
    run = RunSettings(train_iters=1, train_samples=48)
    assert last_iteration(run, BatchSettings(1, size), state) == last
    assert last_iteration(RunSettings(train_iters=7), BatchSettings(1, size), state) == 7


def test_a_run_that_has_had_its_samples_ends_where_it_is():
    assert last_iteration(RunSettings(1, train_samples=20), BatchSettings(1, 4), TrainState(6, 24, 6, ((6, 4),))) == 6


@pytest.mark.parametrize("state, batch, past", [
    ((5, 14), BatchSettings(1, 6, (2, 2, 8)), ()),          # 2 2 4 are 8, then 6: not these arguments' run
    ((4, 14), BatchSettings(1, 6, (2, 2, 8)), ((2, 2), (1, 4), (1, 6))),
    ((6, 24), BatchSettings(1, 8), ((6, 4),)),
    ((4, 30), BatchSettings(1, 8), ((2, 7), (2, 8)))])
def test_checkpoints_without_a_record_of_their_batches(state, batch, past):
    """That of these arguments, if it comes to as many samples; else batches as even as they can be."""
    found = with_past(TrainState(*state), batch)
    assert found.batches == (past or ((1, 2), (4, 3)))
    assert timeline(batch, found).samples(state[0]) == state[1]


def test_the_record_is_kept_in_a_checkpoint(tmp_path):
    state = TrainState().after(4, True).after(4, False).after(8, True)
    assert state == TrainState(3, 16, 2, ((2, 4), (1, 8)))
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    assert read_state(tmp_path) == state
    assert Timeline(state.batches, 2).samples(5) == 20
