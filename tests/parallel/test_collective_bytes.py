"""What each collective of a step sends, counted on every rank, beside the least (docs/benchmarks.md has the table)."""

import pytest
from cases import Case, covering_cases
from collective_bytes import (
    GATHERED,
    REDUCED,
    REGIONS,
    REPLICATED,
    RING,
    SHOWN,
    STAGES,
    TOKENS,
    VOCABULARY,
    Sent,
    least,
    least_of_weights,
    of_all_ranks,
    replicated_bytes,
    sent_in_a_step,
)

PADDING = 1.1  # of the rows of a weight that do not divide among data ranks; weights are small here

QUICK = SHOWN[0], SHOWN[2]
CASES = [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in SHOWN]
# Of which all weights are gathered, and their gradients reduced, once a step.
OF_ARRAY = [case for case in covering_cases()
            if case.lora == "none" and not case.frozen and not case.reshard and case.dp * case.cp > 1]


def assert_weights_travel_once(sent: Sent, case: Case) -> None:
    needed = least_of_weights(case, sent.pp_rank)
    for name in (GATHERED, REDUCED):
        assert needed <= sent.by_purpose[name] <= needed * PADDING, name


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_the_least(ranks, case):
    """Weights and gradients, latents, hidden states, and sums of the loss: to the byte, but for padding. The gradients
    of weights that all tensor-parallel ranks hold are summed before data ranks divide them, not after.
    """
    for sent in ranks.run(case.layout.world_size, sent_in_a_step, case):
        assert_weights_travel_once(sent, case)
        for name in (REGIONS, RING, VOCABULARY, STAGES):
            assert sent.by_purpose.get(name, 0) == least(case, sent.pp_rank)[name], name
        if case.tp > 1:
            assert sent.by_purpose[REPLICATED] == replicated_bytes(case)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_ARRAY, ids=str)
def test_weights_and_gradients_travel_once(ranks, case):
    """Whatever the schedule, recomputation and micro-batches."""
    for sent in ranks.run(case.layout.world_size, sent_in_a_step, case):
        assert_weights_travel_once(sent, case)


def test_copies_for_one_rank_travel_one_by_one(ranks):
    """A token whose two experts are on the same other rank is sent there twice, and no token more often than that."""
    case = SHOWN[0]
    counted, needed = of_all_ranks(case, ranks.run(4, sent_in_a_step, case))[TOKENS]
    assert needed < counted < 2 * needed
